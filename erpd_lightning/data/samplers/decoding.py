"""Decoding: tokens drawn one after the other from log-probs over the vocabulary, for many responses at a time.

Responses that have ended leave the batch, so that they cost nothing; what a response is drawn from is its prompt and
its own random numbers, whichever others are beside it.
"""

import inspect
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import UserError
from ..progress import tell_drawn
from .base import Response

KEPT_SHARE = 0.75
"""Once no more rows than this are left of those in memory, they are copied together; each time costs such a copy."""


class NextLogps(Protocol):
    """What responses are drawn from."""

    def __call__(self, ids: Tensor) -> Tensor:
        """Log-probs of the next token, `(B, V)` in nats, after all tokens so far, padding included: `(B, L + t)`."""

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows alone, `(kept,)` indices; calls then have as many."""


class PolicyReader:
    """Logits of a policy on sequences that grow by a token at a time; each token is read once, if there is a cache.

    Args:
        model: The language model.
        attention_mask: `(B, L)` of the prompts, padded on the left.
        max_new_tokens: Most tokens that are added.
    """

    def __init__(self, model: Any, attention_mask: Tensor, max_new_tokens: int) -> None:
        self._model = model
        added = attention_mask.new_ones(len(attention_mask), max_new_tokens)
        self._mask = torch.cat([attention_mask, added], dim=1)
        self._positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        self._cache: Any = None
        self._accepts = inspect.signature(model.forward).parameters
        # transformers 5.24 renamed it.
        self._cache_name = "cache" if "cache" in self._accepts else "past_key_values"

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits of the next token, `(B, V)`, after all tokens so far, padding included: `(B, L + t)`."""
        width = ids.shape[1]
        # An architecture without such a cache reads everything again.
        unread = ids if self._cache is None else ids[:, -1:]
        more: dict[str, Any] = {self._cache_name: self._cache}
        if "position_ids" in self._accepts:  # Others count by the attention mask themselves.
            more["position_ids"] = self._positions[:, width - unread.shape[1] : width]
        if "logits_to_keep" in self._accepts:
            more["logits_to_keep"] = 1
        output = self._model(input_ids=unread, attention_mask=self._mask[:, :width], use_cache=True, **more)
        self._cache = output.get(self._cache_name)
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows alone."""
        self._mask, self._positions = self._mask[rows], self._positions[rows]
        if hasattr(self._cache, "reorder_cache"):  # `batch_select_indices` leaves out the states of linear attention.
            self._cache.reorder_cache(rows)
        else:
            self._cache = None  # All tokens are read again, once.


class TemperedPolicy:
    """A policy at a temperature, as what responses are drawn from."""

    def __init__(self, reader: PolicyReader, temperature: float) -> None:
        self._reader = reader
        self._temperature = temperature
        self.keep = reader.keep

    def __call__(self, ids: Tensor) -> Tensor:
        """See `NextLogps`."""
        logits = self._reader(ids)
        return (logits if self._temperature == 1.0 else logits / self._temperature).log_softmax(-1)


class StopStrings:
    """Tells which responses have just said one of some strings.

    Args:
        tokenizer: The policy's tokenizer.
        strings: The strings, none of them empty.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._strings = strings
        # A token is at least a byte; what the first one of a piece says can depend on what stood before it.
        self._window = max((len(each.encode()) for each in strings), default=0) + 2

    def __call__(self, responses: Tensor) -> Tensor:
        """Whether the last tokens of each response, `(B, t)` ids, say one, `(B,)`; to be asked after every token."""
        ended = torch.zeros(len(responses), dtype=torch.bool, device=responses.device)
        if not self._strings:
            return ended
        texts = self._tokenizer.batch_decode(responses[:, -self._window :], clean_up_tokenization_spaces=False)
        said = [any(each in text for each in self._strings) for text in texts]
        return torch.tensor(said, device=responses.device)


def decode(
    next_logps: NextLogps, prompts: Tensor, ends: Collection[int], uniforms: Tensor, stops: StopStrings
) -> list[Response]:
    """One response to each prompt.

    Args:
        next_logps: What they are drawn from.
        prompts: `(B, L)` token ids, padded on the left.
        ends: Tokens that end a response.
        uniforms: `(B, T)` random numbers from 0 to 1, float64: one for each token that a response may have.
        stops: Tells which responses have come to an end otherwise.

    Raises:
        UserError: If log-probs are not finite.
    """
    (batch, width), longest = prompts.shape, uniforms.shape[1]
    ids = torch.cat([prompts, prompts.new_zeros(batch, longest)], dim=1)
    end_ids = torch.tensor(sorted(ends), device=prompts.device)
    drawn = prompts.new_zeros(batch, longest)
    logps = torch.zeros(batch, longest, dtype=torch.float32, device=prompts.device)  # Whatever the default is.
    lengths = torch.full((batch,), longest, device=prompts.device)
    ended = torch.zeros(batch, dtype=torch.bool, device=prompts.device)
    rows = torch.arange(batch, device=prompts.device)  # Which response each row in memory is.
    still_open = batch
    for step in range(longest):
        known = next_logps(ids[:, : width + step])
        tokens = draw_tokens(known, uniforms[rows, step])
        ids[:, width + step] = tokens
        drawn[rows, step] = tokens
        logps[rows, step] = known.gather(1, tokens[:, None])[:, 0]
        # A row that has ended goes on until the others are copied together; what it then says does not count.
        says_end = torch.isin(tokens, end_ids) | stops(ids[:, width : width + step + 1])
        ends_now = rows[says_end & ~ended[rows]]
        lengths[ends_now] = step + 1
        ended[ends_now] = True
        tell_drawn(still_open, len(ends_now))
        still_open -= len(ends_now)
        left = (~ended[rows]).nonzero()[:, 0]
        if len(left) == 0:
            break
        if len(left) <= KEPT_SHARE * len(rows) and step + 1 < longest:
            rows, ids = rows[left], ids[left]
            next_logps.keep(left)
    tell_drawn(0, still_open)
    if not logps.isfinite().all():
        raise UserError("the policy gives log-probs that are not finite: its weights are damaged, or have diverged")
    return [
        Response(row[:length], logp[:length], "stop" if stop else "length")
        for row, logp, length, stop in zip(
            drawn.tolist(), logps.tolist(), lengths.tolist(), ended.tolist(), strict=True
        )
    ]


def draw_tokens(logps: Tensor, uniforms: Tensor) -> Tensor:
    """A token for each row, `(B,)`, drawn by inverting the distribution function; one with probability 0 never.

    Args:
        logps: `(B, V)`, in nats.
        uniforms: `(B,)` numbers from 0 to 1, float64.
    """
    summed = logps.exp().double().cumsum(-1)
    # Rounding leaves the last sum beside 1.
    tokens = torch.searchsorted(summed, uniforms[:, None] * summed[:, -1:], right=True)[:, 0]
    return tokens.clamp(max=logps.shape[1] - 1)
