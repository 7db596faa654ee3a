"""A policy in a LightningModule: loaded, run by `Trainer.predict` on prompts or stored rollouts, and exported."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from ..data.predict_data import PredictToStore, Scores, ScoringPart
from ..data.prompt_batches import Drawn, PromptBatch
from ..data.rescoring import LogpsPart
from ..errors import check_at_least
from ..models.head import MAX_LOGITS
from ..models.policy import Policy, check_dtype, export_policy, load_policy, load_reference, policy_fingerprint
from .scoring import score
from .strategies import check_ranks, check_strategy


class PolicyModule(LightningModule):
    """A policy that `Trainer.predict` samples from or asks about stored rollouts, and references to compare it with.

    Args:
        policy: Folder or hub name of the causal language model.
        references: Policies that a KL is measured to, by name, as folders or hub names; None for the policy itself, as
            `base`.
        dtype: Data type of the weights, as in `torch`.
        max_logits: The most logits to hold at a time, the bound on the output head's memory.

    Raises:
        InvalidArgument: For a value out of range.
    """

    def __init__(
        self,
        policy: str | Path,
        references: dict[str, str] | None = None,
        dtype: str = "float32",
        max_logits: int = MAX_LOGITS,
    ) -> None:
        super().__init__()
        check_at_least(1, max_logits=max_logits)
        check_dtype(dtype)
        self.policy_path = policy
        self.references = {"base": str(policy)} if references is None else references
        self.weights_dtype = dtype
        self.max_logits = max_logits
        self.policy: Policy
        # Kept from the optimizer, from checkpoints and from wrapping by leaving them unregistered.
        self._references: dict[str, Policy] = {}

    @property
    def fingerprint(self) -> str:
        """What tells the starting policy apart from others."""
        return policy_fingerprint(self.policy_path)

    def configure_model(self) -> None:
        """Load the policy, once, unless it is sampled from elsewhere; sharded strategies call this in their context."""
        data = self._predict_data
        if not hasattr(self, "policy") and (data is None or data.needs_model):
            self.policy = load_policy(self.policy_path, self.weights_dtype, self.max_logits)

    # References: frozen policies, in memory while they are asked.

    @property
    def reference_paths(self) -> dict[str, str]:
        """Where the policies lie that can be had as references, by name."""
        return self.references

    def reference(self, name: str) -> Policy:
        """A frozen policy, loaded on first use and kept until `release_references`."""
        if name not in self._references:
            key = "references" if name in self.references else "policies"
            path = self.reference_paths[name]
            same = (held for other, held in self._references.items() if self.reference_paths[other] == path)
            self._references[name] = next(same, None) or load_reference(path, self.policy, f"{key}.{name}")
        return self._references[name]

    @contextmanager
    def reference_context(self, name: str) -> Iterator[Policy]:
        """A frozen policy for a while; it goes again unless it was in memory before."""
        held = name in self._references
        try:
            yield self.reference(name)
        finally:
            if not held:
                self._references.pop(name, None)

    def release_references(self) -> None:
        """Let the frozen policies go from memory."""
        self._references.clear()

    # Prediction: fresh responses, or the scores of stored ones.

    def setup(self, stage: str) -> None:
        """Refuse a strategy that is not supported, and say which policy a prediction into a store is of.

        Raises:
            UserError: If the policy would be trained wrongly or lost with the trainer's strategy.
        """
        check_strategy(self.trainer.strategy)
        check_ranks(self.trainer)
        if (data := self._predict_data) is not None:
            data.connect(self)

    @property
    def _predict_data(self) -> PredictToStore | None:
        """The trainer's data module, if what is predicted goes into a store."""
        data = getattr(self._trainer, "datamodule", None)
        return data if isinstance(data, PredictToStore) else None

    @torch.no_grad()
    def predict_step(
        self, batch: PromptBatch | LogpsPart | ScoringPart | None, batch_idx: int
    ) -> pa.Table | Drawn | list[Tensor] | list[Scores]:
        """Responses to prompts, a table of the `ROLLOUTS` schema; or log-probs or scores of stored responses.

        Responses that go into a store are not verified yet: that is done while the next ones are drawn.
        """
        if batch is None:
            return []
        if isinstance(batch, PromptBatch):
            if self._predict_data is None:
                return self.respond(batch)
            return batch.draw(self.policy.model if batch.sampler.needs_model else None)
        if isinstance(batch, LogpsPart):
            return self.token_logps(batch)
        return [score(self.policy, rollouts) for rollouts in batch.batches]

    def respond(self, batch: PromptBatch) -> pa.Table:
        """Responses to prompts, a table of the `ROLLOUTS` schema."""
        return batch.respond(self.policy.model if batch.sampler.needs_model else None)

    @torch.no_grad()
    def token_logps(self, part: LogpsPart) -> list[Tensor]:
        """Log-probs of the tokens of stored responses, `(B, T)` in nats for each batch."""
        return [self.policy.token_logps(batch.to(self.device)).logps for batch in part.batches]

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Hand over what a store is to keep."""
        if (data := self._predict_data) is not None and batch is not None:
            data.write(batch, outputs)

    def on_predict_end(self) -> None:
        """Finish the store."""
        if (data := self._predict_data) is not None:
            data.finish()

    # Export.

    def export(self, path: str | Path, tokenizer: str | Path | None = None) -> None:
        """Write the policy as a Hugging Face folder; call it on every rank.

        Args:
            path: The folder, which appears whole or not at all.
            tokenizer: Where the tokenizer is; None for beside the starting policy.
        """
        with self._on_rank_zero() as writes:
            if writes:
                source = self.policy_path if tokenizer is None else tokenizer
                export_policy(self.policy.model, source, Path(path))

    @contextmanager
    def _on_rank_zero(self) -> Iterator[bool]:
        """Whether this rank does the block's work; all ranks leave it together."""
        trainer = self._trainer
        try:
            yield trainer is None or trainer.is_global_zero
        finally:
            if trainer is not None:
                trainer.strategy.barrier()
