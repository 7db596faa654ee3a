"""Sampling with `generate` of transformers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...models.generation import end_tokens, generation_config
from ...models.loading import check_tokenizer
from ..progress import DrawnCriteria, tell_drawn
from .base import Response, Sampler


class TransformersSampler(Sampler):
    """Samples with `generate` of transformers, on whatever device the model is."""

    @torch.no_grad()
    def sample(self, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], seed: int) -> list[Response]:
        """See `Sampler.sample`. Global random state is left as it was.

        Raises:
            UserError: If the tokenizer has tokens that the model does not know.
        """
        check_tokenizer(tokenizer, model)
        with self.drawing([model], seed):
            return [
                response
                for encoded in self.padded(model, tokenizer, prompts)
                for response in self.generate(model, tokenizer, encoded, self.recorder())
            ]

    def recorder(self) -> "LogpRecorder":
        """What notes the log-probs of some responses, and may rule out tokens."""
        return LogpRecorder(self.temperature)

    @contextmanager
    def drawing(self, models: Sequence[Any], seed: int) -> Iterator[None]:
        """Models in eval mode and random state of one's own; both are as they were afterwards."""
        device = models[0].device
        were_training = [model.training for model in models]
        for model in models:
            model.eval()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
        for model, was_training in zip(models, were_training, strict=True):
            model.train(was_training)

    def padded(self, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> Iterator[Any]:
        """Ids and attention masks of `batch_size` prompts at a time, on the model's device."""
        for first in range(0, len(prompts), self.batch_size):
            chunk = list(prompts[first : first + self.batch_size])
            yield tokenizer.pad({"input_ids": chunk}, return_tensors="pt").to(model.device)

    def generate(self, model: Any, tokenizer: Any, encoded: Any, recorder: "LogpRecorder") -> list[Response]:
        """One response to each of some padded prompts, drawn from what the recorder makes of the logits."""
        device = encoded["input_ids"].device
        ends = sorted(end_tokens(tokenizer, model.generation_config.eos_token_id))
        end_ids = torch.tensor(ends, device=device)
        plain = generation_config(
            model,
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
        with plain:
            sequences = model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                logits_processor=[recorder],
                stopping_criteria=[DrawnCriteria(end_ids)],
            )
        ids = sequences[:, encoded["input_ids"].shape[1] :]
        logps = recorder.finish(sequences)
        ended = torch.isin(ids, end_ids)
        # Up to and including the first end-of-sequence token; what follows is padding.
        lengths = ((ended.cumsum(1) - ended.long()) == 0).sum(1).tolist()
        reasons = ["stop" if stop else "length" for stop in ended.any(1).tolist()]
        tell_drawn(0, reasons.count("length"))
        return [
            Response(row[:length], logp[:length], reason)
            for row, logp, length, reason in zip(ids.tolist(), logps.tolist(), lengths, reasons, strict=True)
        ]


class LogpRecorder:
    """A logits processor that changes nothing and notes each sampled token's log-prob.

    Only one `(B, V)` tensor lives at a time, where `output_logits` of `generate` keeps one for every token.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self._pending: Tensor | None = None
        self._logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._note(input_ids)
        self._pending = (scores.float() / self.temperature).log_softmax(-1)
        return scores

    def finish(self, sequences: Tensor) -> Tensor:
        """The log-probs of all sampled tokens, `(B, T)`; what follows the end of a response is meaningless."""
        self._note(sequences)
        return torch.stack(self._logps, dim=1)

    def _note(self, ids: Tensor) -> None:
        if self._pending is not None:
            self._logps.append(self._pending.gather(1, ids[:, -1:])[:, 0])
