"""Decoding from the distillation target itself: the base policy tilted by a signal, with no student trained. Ours."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...objectives.divergences import entropy, exact_kl
from ...objectives.signal import Signal
from ...objectives.tilted_policy import LOG_ZERO, tilt
from .base import Response, Sampler
from .transformers import LogpRecorder, TransformersSampler


class TiltedResponse(NamedTuple):
    """A response drawn from the target, and what it spent.

    Attributes:
        response: The response, with the target's log-probs.
        kl: KL of the target to the base policy, in nats, exact over the vocabulary, at each token.
        entropy: Entropy of the target, in nats, at each token.
    """

    response: Response
    kl: list[float]
    entropy: list[float]


class TiltedSampler:
    """Samples from `pi*_beta(v) = pi_0(v) exp(s(v) / beta) / Z` with `generate` of transformers.

    The base policy generates; the others read along, each with a cache of its own. All of them are the policies at the
    sampler's temperature, as they were when the rollouts were scored, and so is the target that is drawn from; KL and
    entropy are the target's.

    Args:
        sampler: Longest response, temperature and batch size.
        signal: What tilts the base policy.
        beta: Price of a nat of KL.
    """

    def __init__(self, sampler: Sampler, signal: Signal, beta: float) -> None:
        self.temperature = sampler.temperature
        self.sampler = TransformersSampler(sampler.max_new_tokens, batch_size=sampler.batch_size)
        self.signal = signal
        self.beta = beta

    @torch.inference_mode()
    def sample(
        self, models: Mapping[str, Any], tokenizer: Any, prompts: Sequence[Sequence[int]], seed: int
    ) -> list[TiltedResponse]:
        """One response to each of the tokenised prompts, in order; the same for the same seed.

        Args:
            models: The base policy, called `base`, and those that the signal compares, as language models.
            tokenizer: Their tokenizer, padding on the left.
            prompts: Token ids.
            seed: Seed of the draws. Global random state is left as it was.
        """
        base = models["base"]
        others = {name: models[name] for name in self.signal.policies if name != "base"}
        drawn = []
        with self.sampler.drawing([base, *others.values()], seed):
            for encoded in self.sampler.padded(base, tokenizer, prompts):
                readers = {name: _Reader(model, encoded["attention_mask"]) for name, model in others.items()}
                recorder = _TiltedRecorder(self.temperature, readers, self.signal, self.beta)
                responses = self.sampler.generate(base, tokenizer, encoded, recorder)
                for response, kl, own in zip(responses, *recorder.spent(), strict=True):
                    length = len(response.ids)
                    drawn.append(TiltedResponse(response, kl[:length], own[:length]))
        return drawn


class _Reader:
    """A policy that reads the tokens that another one writes.

    Args:
        model: The policy.
        attention_mask: `(B, L)` of the prompts, padded on the left.
    """

    def __init__(self, model: Any, attention_mask: Tensor) -> None:
        self._model = model
        self._mask = attention_mask
        self._cache: Any = None
        self._accepts = inspect.signature(model.forward).parameters
        # transformers 5.24 renamed it.
        self._cache_name = "cache" if "cache" in self._accepts else "past_key_values"

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits of the next token, `(B, V)`, after all tokens so far, padding included: `(B, L + t)`."""
        added = self._mask.new_ones(len(ids), ids.shape[1] - self._mask.shape[1])
        mask = torch.cat([self._mask, added], dim=1)
        # An architecture without such a cache reads everything again.
        unread = ids if self._cache is None else ids[:, -1:]
        more: dict[str, Any] = {self._cache_name: self._cache}
        if "position_ids" in self._accepts:  # Others count by the attention mask themselves.
            more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -unread.shape[1] :]
        if "logits_to_keep" in self._accepts:
            more["logits_to_keep"] = 1
        output = self._model(input_ids=unread, attention_mask=mask, use_cache=True, **more)
        self._cache = output.get(self._cache_name)
        logits: Tensor = output.logits[:, -1].float()
        return logits


class _TiltedRecorder(LogpRecorder):
    """A logits processor that puts the target's log-probs in the place of the base policy's logits."""

    def __init__(self, temperature: float, readers: Mapping[str, _Reader], signal: Signal, beta: float) -> None:
        super().__init__(temperature=1.0)  # The target is at the policies' temperature already.
        self._temperature = temperature
        self._readers = readers
        self._signal = signal
        self._beta = beta
        self._kls: list[Tensor] = []
        self._entropies: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = {"base": scores.float(), **{name: reader(input_ids) for name, reader in self._readers.items()}}
        logps = {name: (values / self._temperature).log_softmax(-1) for name, values in logits.items()}
        # An entry that is ruled out in two policies has no ratio.
        logps = {name: values.clamp(min=LOG_ZERO) for name, values in logps.items()}
        target = tilt(logps["base"], self._signal(logps), self._beta)
        # Rounding may leave a vanishing KL slightly negative.
        self._kls.append(exact_kl(target, logps["base"]).clamp(min=0))
        self._entropies.append(entropy(target))
        return super().__call__(input_ids, target)

    def spent(self) -> tuple[list[list[float]], list[list[float]]]:
        """KL to the base policy and entropy at each token, `(B, T)`; meaningless after a response's end."""
        return torch.stack(self._kls, dim=1).tolist(), torch.stack(self._entropies, dim=1).tolist()
