"""Passes of a policy over prompts or stored rollouts, as data modules for `Trainer.predict`.

What each part of a pass gives is written at once, by the rank that made it. A pass that was killed goes on with
the parts that are missing, on any number of processes, and ends with the same store.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from ..errors import UserError
from ..models.loading import has_tokenizer, load_tokenizer
from .batching import RolloutBatch, RolloutTable, ScoreTable
from .loader import cut_step, micro_batches, pieces_needed
from .prompts import PromptBatch
from .store import ROLLOUTS, SCORES, Store, StoreWriter

if TYPE_CHECKING:
    from .rollouts import RolloutDataModule


# Padded tokens of a part of the scores: a pass that goes on with less memory still has to find its parts.
PART_TOKENS = 16384


class Scores(NamedTuple):
    """What a policy says about the tokens of a batch, aligned to `(B, T)`, in nats.

    Attributes:
        logps: `(B, T)` of the sampled tokens.
        support_ids: `(B, T, K)` vocabulary entries of the support, padded with -1.
        support_logps: `(B, T, K + 1)` of the support and its tail.
    """

    logps: Tensor
    support_ids: Tensor
    support_logps: Tensor


class Parts:
    """Ready batches as a data loader; Lightning would take a list for several loaders."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = list(batches)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


class StorePass(LightningDataModule):
    """A pass whose parts end up in a store."""

    def __init__(self, data: "RolloutDataModule", schema: pa.Schema, path: Any) -> None:
        super().__init__()
        self.data = data
        self.schema = schema
        self.path = path
        self._writer: StoreWriter | None = None
        self._parts = 0

    @abstractmethod
    def batches(self, rank: int, world_size: int) -> Iterator[tuple[int, Any]]:
        """All parts as `(number, batch)`, with None as batch for those of other ranks."""

    @abstractmethod
    def columns(self, batch: Any, output: Any) -> Any:
        """The rows of a part, from its batch and from what the policy made of it."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that the rows depend on, apart from the policy."""

    def predict_dataloader(self) -> Parts:
        """This rank's parts that are not written yet; None where there is none.

        Lightning refuses loaders that are empty on some ranks, and leaves out the end of a pass, which finishes
        the store, if they are on all.
        """
        assert self.trainer is not None
        policy: Any = self.trainer.lightning_module
        metadata = {"policy": policy.fingerprint, **self.settings()}
        self._writer = StoreWriter(self.path, self.schema, metadata)
        parts = list(self.batches(*ranks(self.trainer)))
        self._parts = len(parts)
        done = Store.exists(self.path)
        missing = [b for n, b in parts if not (b is None or done or self._writer.has_part(n))]
        return Parts(missing or [None])

    def write(self, batch: Any, output: Any) -> None:
        """Store what the policy made of a part."""
        assert self._writer is not None
        self._writer.write_part(batch.index, self.columns(batch, output))

    def finish(self) -> None:
        """Once every rank has written its parts: make them a store."""
        assert self.trainer is not None
        assert self._writer is not None
        self.trainer.strategy.barrier()
        if self.trainer.is_global_zero:
            self._writer.finish(self._parts)
        self.trainer.strategy.barrier()
        self.data.forget()


def run_pass(store_pass: StorePass, trainer: Any) -> None:
    """Run a pass with the module that the trainer is about to train, where it is and as it is."""
    store_pass.trainer = trainer
    module = trainer.lightning_module
    for batch in store_pass.predict_dataloader():
        if batch is not None:
            store_pass.write(batch, module.predict_step(batch.to(module.device), 0))
    store_pass.finish()


class SamplingPass(StorePass):
    """Samples and verifies the rollouts of a round."""

    def __init__(self, data: "RolloutDataModule") -> None:
        super().__init__(data, ROLLOUTS, data.store)

    def settings(self) -> dict[str, Any]:
        """See `StorePass`."""
        return self.data.sampling_settings()

    def batches(self, rank: int, world_size: int) -> Iterator[tuple[int, PromptBatch | None]]:
        """See `StorePass`."""
        data = self.data
        purpose = "rollouts" if data.iterations == 1 else f"rollouts {data.iteration}"
        for batch in data.prompt_batches(data.round_prompts(), data.group_size, purpose, 0, 1):
            yield batch.index, batch if batch.index % world_size == rank else None

    def columns(self, batch: PromptBatch, output: pa.Table) -> pa.Table:
        """See `StorePass`."""
        return output


@dataclass(frozen=True)
class ScoringPart:
    """Some rollouts to score, in batches that fit in memory, and the number of the part that they make."""

    index: int
    batches: list[RolloutBatch]

    def to(self, device: torch.device) -> "ScoringPart":
        """The same part on a device."""
        return ScoringPart(self.index, [batch.to(device) for batch in self.batches])


class ScoringPass(StorePass):
    """Stores the log-probs of a policy on the rollouts: of the sampled tokens and over the base's support."""

    def __init__(self, data: "RolloutDataModule", name: str) -> None:
        if data.scores is None:
            raise UserError("scoring needs a directory for the scores: RolloutDataModule(scores=…)")
        super().__init__(data, SCORES, data.scores / name)
        self.name = name
        base = data.scores / "base"
        if name != "base" and not Store.exists(base):
            raise UserError(f"{base} is missing: score the policy 'base' first, its support is everyone's")

    def predict_dataloader(self) -> Parts:
        """See `StorePass`.

        Raises:
            UserError: If the policy speaks another vocabulary than the rollouts are written in.
        """
        assert self.trainer is not None
        policy: Any = self.trainer.lightning_module
        path = policy.policy_path
        if has_tokenizer(path) and load_tokenizer(path).get_vocab() != self.data.tokenizer.get_vocab():
            raise UserError(
                f"{path} has another vocabulary than {self.data.tokenizer_path}: the policy {self.name!r} cannot be "
                "asked about tokens that it does not know"
            )
        return super().predict_dataloader()

    def settings(self) -> dict[str, Any]:
        """See `StorePass`."""
        settings = {"name": self.name, "rollouts": Store.open(self.data.store).fingerprint}
        if self.name != "base":
            assert self.data.scores is not None
            settings["support"] = Store.open(self.data.scores / "base").fingerprint
        return settings

    def batches(self, rank: int, world_size: int) -> Iterator[tuple[int, ScoringPart | None]]:
        """See `StorePass`. Responses of similar length make a part, whatever `max_tokens` is."""
        rollouts = self._rollouts()
        lengths = rollouts.lengths
        tokens = max(PART_TOKENS, int(lengths.max()))
        parts = cut_step(lengths, pieces_needed(lengths, len(lengths), tokens))
        for index, rows in enumerate(parts):
            mine = index % world_size == rank
            yield index, ScoringPart(index, list(micro_batches(rollouts, self.data.max_tokens, rows))) if mine else None

    def columns(self, batch: ScoringPart, output: list[Scores]) -> pa.Table:
        """See `StorePass`: the rows of the `SCORES` schema."""
        rows = [
            pa.Table.from_pydict(_score_columns(rollouts, scores), schema=SCORES)
            for rollouts, scores in zip(batch.batches, output, strict=True)
        ]
        return pa.concat_tables(rows)

    def _rollouts(self) -> RolloutTable:
        """The rollouts, with the base's support for everyone but the base."""
        table = Store.open(self.data.store, verify=False).table()
        if self.name == "base":
            return RolloutTable.from_arrow(table)
        assert self.data.scores is not None
        base = Store.open(self.data.scores / "base", verify=False).table()
        return RolloutTable.from_arrow(table, {"base": ScoreTable.from_arrow(base)})


def _score_columns(rollouts: RolloutBatch, scores: Scores) -> dict[str, Any]:
    """The ragged columns of the `SCORES` schema."""
    mask = rollouts.mask.cpu()
    used = (scores.support_ids >= 0).cpu()
    sizes = used.sum(-1)
    tokens, entries = mask.sum(-1), (sizes * mask).sum(-1)
    return {
        "row": rollouts.rows.cpu().numpy(),
        "logps": _lists(scores.logps.cpu()[mask], tokens),
        "support_size": _lists(sizes[mask].to(torch.int16), tokens),
        "support_ids": _lists(scores.support_ids.cpu()[used].to(torch.int32), entries),
        "support_logps": _lists(scores.support_logps[..., :-1].cpu()[used], entries),
        "tail_logps": _lists(scores.support_logps[..., -1].cpu()[mask], tokens),
    }


def ranks(trainer: Any) -> tuple[int, int]:
    """This process among those that see different data: `(rank, world size)`."""
    kwargs = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    return kwargs["rank"], kwargs["num_replicas"]


def _lists(values: Tensor, lengths: Tensor) -> pa.Array:
    """Flat values as an Arrow array of lists of the given lengths."""
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
    return pa.ListArray.from_arrays(pa.array(offsets.numpy()), pa.array(values.numpy()))
