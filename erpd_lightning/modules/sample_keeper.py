"""A policy whose test leaves its first responses behind, for the report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from ..data.batching import RolloutBatch
from ..data.prompts import PromptBatch
from ..data.samples import kept_rows, sample_table, write_samples
from .evaluation import prompt_sums
from .policy_module import PolicyModule


class SampleKeeper(PolicyModule):
    """A policy to be tested, and the file that its test leaves.

    Args:
        policy: Folder or hub name of the causal language model.
        references: Policies that the KL is measured to, by name; `base` is one of them.
        keep: The file: responses to the first prompts of all ranks, of the `SAMPLES` schema.
    """

    def __init__(self, policy: str | Path, references: Mapping[str, str], keep: Path) -> None:
        super().__init__(policy, references=dict(references))
        self._keep = keep
        self._kept: list[pa.Table] = []

    def on_test_epoch_start(self) -> None:
        """Nothing of an earlier test is kept."""
        self._kept = []

    def _prompt_sums(self, table: pa.Table, prompts: PromptBatch) -> dict[str, Tensor]:
        """Note the first responses on the way."""
        kls: dict[int, list[float]] = {}

        def note(name: str, part: RolloutBatch, kl: Tensor) -> None:
            if name == "base":
                for row, values, mask in zip(part.rows.tolist(), kl.cpu(), part.mask.cpu(), strict=True):
                    kls[row] = values[mask].tolist()

        sums = prompt_sums(self.policy, self.frozen, self.references, table, prompts, note)
        kept = kept_rows(table)
        self._kept.append(sample_table(kept, [kls[row] for row in range(len(kept))], prompts.tokenizer))
        return sums

    def on_test_epoch_end(self) -> None:
        """Log and reset, and write what all ranks noted."""
        super().on_test_epoch_end()
        kept: list[Any] = [self._kept]
        if self.trainer.world_size > 1:
            kept = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(kept, self._kept)
        if self.trainer.is_global_zero:
            write_samples(self._keep, [table for tables in kept for table in tables])
