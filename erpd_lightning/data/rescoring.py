"""Log-probs of stored rollouts as the trainer computes them, beside those of the sampler that drew them.

A server computes in another precision and with other kernels than the trainer, and what was sampled elsewhere may come
with log-probs of its own. The policy that sampled is therefore asked again by the trainer, and the store of its answers
lies in a folder of the rollout store.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from ..errors import UserError
from .batching import RolloutBatch, RolloutTable, opaque, replaced
from .loader import micro_batches
from .predict_data import BatchList, PredictToStore
from .store import LOGPS, TOKEN_COLUMNS, Store

RESCORED = "rescored"
"""Folder of the trainer's log-probs in that of the rollouts."""

ROWS_AT_A_TIME = 256


@opaque
@dataclass(frozen=True)
class LogpsPart:
    """Some rollouts to ask for the log-probs of their tokens, in batches that fit in memory.

    Attributes:
        index: Number of the part.
        first: Row of the store that the rows of the batches are counted from.
        batches: The rollouts.
        source: What the rows are made of where they are in no store yet.
    """

    index: int
    first: int
    batches: list[RolloutBatch]
    source: Any = None

    def to(self, device: torch.device) -> "LogpsPart":
        """The same part on a device."""
        return replaced(self, batches=[batch.to(device) for batch in self.batches])

    def by_row(self, logps: Sequence[Tensor]) -> dict[int, np.ndarray]:
        """Log-probs `(B, T)` of each batch as those of the response of each row, counted from `first`."""
        return {
            row: values[mask].numpy()
            for batch, of_batch in zip(self.batches, logps, strict=True)
            for row, values, mask in zip(batch.rows.tolist(), of_batch.cpu(), batch.mask.cpu(), strict=True)
        }


class RescoringData(PredictToStore):
    """A data module for `Trainer.predict` that stores the log-probs of the policy that sampled, part by part.

    Args:
        rollouts: Directory of the rollout store.
        max_tokens: Padded tokens of a batch.
        on_finish: Called when the store is finished.

    Raises:
        UserError: If there are no finished rollouts.
    """

    def __init__(self, rollouts: Path, max_tokens: int, on_finish: Callable[[], None] = lambda: None) -> None:
        self.rollouts = Store.open(rollouts)
        super().__init__(rollouts / RESCORED, LOGPS, {"rollouts": self.rollouts.fingerprint}, on_finish)
        self.max_tokens = max_tokens

    def predict_dataloader(self) -> BatchList:
        """See `PredictToStore`.

        Raises:
            UserError: If the policy is not the one that sampled.
        """
        sampled_by = self.rollouts.metadata.get("policy")
        if self._policy is not None and sampled_by not in (None, self._policy.fingerprint):
            raise UserError(
                f"{self.rollouts.path} was sampled from another policy than {self._policy.policy_path}: importance "
                "ratios take the log-probs of the one that it was sampled from"
            )
        return super().predict_dataloader()

    def part_count(self) -> int:
        """See `PredictToStore`: the parts are those of the rollouts."""
        return len(self.rollouts.parts)

    def part(self, index: int) -> LogpsPart:
        """See `PredictToStore`."""
        table = RolloutTable.from_arrow(self.rollouts.part(index, TOKEN_COLUMNS))
        first = sum(part["rows"] for part in self.rollouts.parts[:index])
        return LogpsPart(index, first, list(micro_batches(table, self.max_tokens)))

    def columns(self, batch: LogpsPart, output: list[Tensor]) -> pa.Table:
        """See `PredictToStore`: the rows of the `LOGPS` schema."""
        found = batch.by_row(output)
        rows = range(len(found))
        columns = {"row": [batch.first + row for row in rows], "logps": [found[row] for row in rows]}
        return pa.Table.from_pydict(columns, schema=LOGPS)


def rescored_store(rollouts: Store) -> Store | None:
    """The trainer's log-probs of some rollouts; None where the sampler's are the trainer's own.

    Raises:
        UserError: If they are damaged, or those of other rollouts.
    """
    path = rollouts.path / RESCORED
    if not Store.exists(path):
        return None
    store = Store.open(path)
    if store.metadata.get("rollouts") != rollouts.fingerprint:
        raise UserError(f"{path} holds the log-probs of other rollouts than those in {rollouts.path}: delete it")
    return store


def trainer_logps(stores: Sequence[Store]) -> pa.ChunkedArray | None:
    """The trainer's own log-probs of the rollouts of several stores; None where the sampler's are these in all."""
    rescored = [rescored_store(store) for store in stores]
    if not any(rescored):
        return None
    columns = [(own or store).table(["logps"])["logps"] for own, store in zip(rescored, stores, strict=True)]
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks])


@dataclass(frozen=True)
class LogpGap:
    """How far the log-probs of sampler and trainer are apart, per token, in nats.

    Attributes:
        tokens: Number of tokens.
        mean: Mean of the absolute differences.
        p999: Their 99.9th percentile: the least one that is not exceeded by more than one token in a thousand.
        worst: The largest.
    """

    tokens: int
    mean: float
    p999: float
    worst: float


def logp_gap(pairs: Sequence[tuple[Store, Store]]) -> LogpGap:
    """The gap between the log-probs of sampler and trainer; one token in a thousand is kept in memory.

    Args:
        pairs: Rollouts, and the trainer's log-probs of them.
    """
    lengths = (pc.list_value_length(b["logps"]) for _, rescored in pairs for b in rescored.batches(["logps"]))
    tokens = sum(pc.sum(length).as_py() for length in lengths)
    above = tokens // 1000
    total, largest = 0.0, np.zeros(0, np.float32)
    for differences in _differences(pairs):
        total += float(differences.sum(dtype=np.float64))
        largest = np.sort(np.concatenate([largest, differences]))[-above - 1 :]
    if tokens == 0:
        return LogpGap(0, 0.0, 0.0, 0.0)
    return LogpGap(tokens, total / tokens, float(largest[0]), float(largest[-1]))


def _differences(pairs: Sequence[tuple[Store, Store]]) -> Iterator[np.ndarray]:
    """Absolute differences of the tokens of some responses at a time."""
    for pair in pairs:
        for batches in zip(*(store.batches(["logps"], ROWS_AT_A_TIME) for store in pair), strict=True):
            sampler, trainer = (pc.list_flatten(batch["logps"]).to_numpy() for batch in batches)
            yield np.abs(sampler - trainer)
