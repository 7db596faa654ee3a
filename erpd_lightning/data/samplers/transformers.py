"""Sampling from a model in memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...errors import check_at_least
from ...models.generation import end_tokens
from ...models.loading import check_tokenizer
from .base import Response, Sampler
from .decoding import NextLogps, PolicyReader, StopStrings, TemperedPolicy, decode


class TransformersSampler(Sampler):
    """Samples from a language model of transformers, on whatever device it is.

    Prompts of similar length are run together. Responses that have ended cost nothing.

    Args:
        max_new_tokens: Longest response in tokens.
        temperature: What the logits are divided by; the stored log-probs are those of the tempered policy.
        batch_size: Responses that are drawn, and stored, at a time.
        max_cache_tokens: Tokens of prompts and responses whose keys and values may be in memory at a time; with longer
            responses fewer are drawn together. It changes no response but by rounding.
        stop: Strings that end a response where it says them; they are part of it.
    """

    operational_arguments = frozenset({"max_cache_tokens"})

    def __init__(
        self,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        batch_size: int = 256,
        max_cache_tokens: int = 131_072,
        stop: Sequence[str] = (),
    ) -> None:
        super().__init__(max_new_tokens, temperature, batch_size, stop)
        check_at_least(1, max_cache_tokens=max_cache_tokens)
        self.max_cache_tokens = max_cache_tokens

    @torch.no_grad()
    def sample(self, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], seed: int) -> list[Response]:
        """See `Sampler.sample`. Global random state is left as it was.

        Raises:
            UserError: If the tokenizer has tokens that the model does not know, or the model's log-probs are not
                finite.
        """
        check_tokenizer(tokenizer, model)
        ends = end_tokens(tokenizer, model.generation_config.eos_token_id)
        stops = StopStrings(tokenizer, self.stop)
        found: dict[int, Response] = {}
        with models_in_eval_mode(model):
            for rows, encoded, uniforms in self.batches(model.device, tokenizer, prompts, seed):
                reader = PolicyReader(model, encoded["attention_mask"], self.max_new_tokens)
                drawn = decode(self.next_logps(reader), encoded["input_ids"], ends, uniforms, stops)
                found.update(zip(rows, drawn, strict=True))
        return [found[row] for row in range(len(prompts))]

    def next_logps(self, reader: PolicyReader) -> NextLogps:
        """What responses are drawn from."""
        return TemperedPolicy(reader, self.temperature)

    def batches(
        self, device: torch.device, tokenizer: Any, prompts: Sequence[Sequence[int]], seed: int
    ) -> Iterator[tuple[list[int], Any, Tensor]]:
        """Prompts that are run together: which, their padded ids and attention mask, and their random numbers.

        The longest come first: what does not fit in memory shows at once.

        Args:
            device: Where the model is.
            tokenizer: Pads on the left.
            prompts: Token ids.
            seed: Seed of the random numbers, `(B, max_new_tokens)`, of which each prompt has its own.
        """
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(len(prompts), self.max_new_tokens, generator=generator, dtype=torch.float64)
        waiting = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        while waiting:
            width = len(prompts[waiting[0]]) + self.max_new_tokens
            size = max(1, min(self.batch_size, self.max_cache_tokens // width))
            rows, waiting = waiting[:size], waiting[size:]
            encoded = tokenizer.pad({"input_ids": [list(prompts[row]) for row in rows]}, return_tensors="pt")
            yield rows, encoded.to(device), uniforms[rows].to(device)


@contextmanager
def models_in_eval_mode(*models: Any) -> Iterator[None]:
    """Models in eval mode; as they were afterwards."""
    were_training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, was_training in zip(models, were_training, strict=True):
            model.train(was_training)
