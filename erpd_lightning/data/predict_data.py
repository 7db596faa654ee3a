"""Data modules for `Trainer.predict` that store what a policy makes of prompts or of stored rollouts.

What each part gives is written at once, by the rank that made it. A prediction that was killed goes on with the parts
that are missing, on any number of processes, and ends with the same store.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from ..errors import UserError
from ..models.loading import has_tokenizer, load_tokenizer
from .batching import RolloutBatch, RolloutTable, ScoreTable, offsets_of, opaque
from .deferred import Deferred
from .loader import micro_batches, micro_batches_needed, partition_step
from .prompt_batches import Drawn, PromptBatch, PromptBatches
from .ranks import ranks
from .samplers import Sampler
from .store import ROLLOUTS, SCORES, TOKEN_COLUMNS, Store, StoreWriter
from .threads import Pending

# Padded tokens of a part of the scores: what goes on with less memory still has to find its parts.
PART_TOKENS = 16384

MOST_PENDING = 1
"""Batches of responses that are verified while the next one is drawn: a killed run draws them again."""


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


class BatchList:
    """Batches as a data loader, each made when it is asked for; Lightning would take a list for several loaders.

    Args:
        batches: The batches.
        responses: How many responses are drawn for them in all.
    """

    def __init__(self, batches: Sequence[Any], responses: int = 0) -> None:
        self._batches = batches
        self.responses = responses

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


class PolicySource(Protocol):
    """What a prediction needs to know of the policy that it runs; the module hands itself over in `setup`."""

    @property
    def policy_path(self) -> str | Path:
        """Folder or hub name of the policy."""

    @property
    def fingerprint(self) -> str:
        """What tells the policy apart from others."""


class PredictToStore(LightningDataModule):
    """A data module for `Trainer.predict` whose predictions end up in a store.

    Args:
        path: Directory of the store.
        schema: `ROLLOUTS` or `SCORES`.
        settings: All that the rows depend on, apart from the policy.
        on_finish: Called when the store is finished.
    """

    def __init__(
        self,
        path: Path,
        schema: pa.Schema,
        settings: Mapping[str, Any],
        on_finish: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.path = path
        self.schema = schema
        self.settings = settings
        self.on_finish = on_finish
        self._policy: PolicySource | None = None
        self._writer: StoreWriter | None = None

    @property
    def needs_model(self) -> bool:
        """Whether the policy has to be in memory."""
        return True

    @abstractmethod
    def part_count(self) -> int:
        """Parts of the store."""

    @abstractmethod
    def part(self, index: int) -> Any:
        """What a policy is run on for a part; its `index` says which."""

    @abstractmethod
    def columns(self, batch: Any, output: Any) -> pa.Table:
        """The rows of a part, from its batch and from what the policy made of it."""

    def connect(self, policy: PolicySource) -> None:
        """Take the policy that is run; a module calls this in its `setup`."""
        self._policy = policy

    def predict_dataloader(self) -> BatchList:
        """This rank's parts that are not written yet; None where there is none.

        Lightning refuses loaders that are empty on some ranks, and leaves out the end of a prediction, which finishes
        the store, if they are on all.

        Raises:
            UserError: If no module handed its policy over.
        """
        assert self.trainer is not None
        if self._policy is None:
            raise UserError(
                f"{type(self).__name__} does not know which policy it runs: the module has to call its connect(policy) "
                "in setup, as a PolicyModule does"
            )
        self._writer = StoreWriter(self.path, self.schema, {"policy": self._policy.fingerprint, **self.settings})
        rank, world_size = ranks(self.trainer)
        missing: list[int] = []
        if not Store.exists(self.path):
            mine = range(rank, self.part_count(), world_size)
            missing = [index for index in mine if not self._writer.has_part(index)]
        return BatchList(Deferred(self.part, missing) if missing else [None], sum(map(self.responses, missing)))

    def responses(self, index: int) -> int:
        """How many responses are drawn for a part, which is known without making it."""
        return 0

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
            self._writer.finish(self.part_count())
        self.trainer.strategy.barrier()
        self.on_finish()


def predict_to_store(data: PredictToStore, policy: PolicySource, predict: Callable[[Any], Any], trainer: Any) -> None:
    """Make a store in the middle of a training, with the policy that is trained as it is.

    Args:
        data: Says what is predicted, and keeps it.
        policy: The policy.
        predict: What the policy makes of a part.
        trainer: The trainer of the training; only its ranks, barriers and precision are used.
    """
    data.trainer = trainer
    data.connect(policy)
    for batch in data.predict_dataloader():
        if batch is not None:
            with trainer.precision_plugin.predict_step_context():
                output = predict(batch)
            data.write(batch, output)
    data.finish()


class SamplingData(PredictToStore):
    """A data module for `Trainer.predict` that samples and verifies responses to prompts.

    Whatever the sampler needs, such as a server, is there from when a rank has its prompts until it has all responses,
    and goes as well where the prediction fails.

    Args:
        sampler: Draws the responses.
        make_batches: Makes the batches of prompts of all ranks, once they are needed.
        path: Directory of the store.
        settings: All that the responses depend on, apart from the policy.
        on_finish: Called when the store is finished.
    """

    def __init__(
        self,
        sampler: Sampler,
        make_batches: Callable[[], PromptBatches],
        path: Path,
        settings: Mapping[str, Any],
        on_finish: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(path, ROLLOUTS, settings, on_finish)
        self._sampler = sampler
        self._make_batches = make_batches
        self._served = ExitStack()
        self._pending: list[tuple[PromptBatch, Pending[pa.Table]]] = []

    @property
    def needs_model(self) -> bool:
        """See `PredictToStore`."""
        return self._sampler.needs_model

    def predict_dataloader(self) -> BatchList:
        """See `PredictToStore`."""
        batches = super().predict_dataloader()
        if batches.responses:
            self._serve()
        return batches

    def _serve(self) -> None:
        assert self._policy is not None
        _, world_size = ranks(self.trainer)
        own = torch.cuda.current_device() if world_size > 1 and torch.cuda.is_available() else None
        self._served.enter_context(self._sampler.serving(self._policy.policy_path, self.path, own))

    def on_exception(self, exception: BaseException) -> None:
        """Let go of what the sampler needed."""
        self._served.close()

    def part_count(self) -> int:
        """See `PredictToStore`."""
        return len(self._batches)

    def part(self, index: int) -> PromptBatch:
        """See `PredictToStore`."""
        return self._batches[index]

    def columns(self, batch: PromptBatch, output: pa.Table) -> pa.Table:
        """See `PredictToStore`."""
        return output

    def write(self, batch: PromptBatch, output: pa.Table | Drawn) -> None:
        """Store responses; those that are not verified yet are, while the policy goes on with the next prompts."""
        if not isinstance(output, Drawn):
            return super().write(batch, output)
        self._pending.append((batch, Pending(batch.verified, output)))
        self._write_verified(MOST_PENDING)

    def finish(self) -> None:
        """See `PredictToStore`; waits for what is not verified yet."""
        self._served.close()
        self._write_verified(0)
        super().finish()

    def _write_verified(self, most: int) -> None:
        """Store what has been verified, and wait until no more than `most` batches are left."""
        while self._pending and (len(self._pending) > most or self._pending[0][1].is_done):
            batch, verified = self._pending.pop(0)
            super().write(batch, verified.result())

    def responses(self, index: int) -> int:
        """See `PredictToStore`."""
        return self._batches.responses[index]

    @cached_property
    def _batches(self) -> PromptBatches:
        return self._make_batches()


@opaque
@dataclass(frozen=True)
class ScoringPart:
    """Some rollouts to score, in batches that fit in memory, and the number of the part that they make."""

    index: int
    batches: list[RolloutBatch]

    def to(self, device: torch.device) -> "ScoringPart":
        """The same part on a device."""
        return ScoringPart(self.index, [batch.to(device) for batch in self.batches])


class ScoringData(PredictToStore):
    """A data module for `Trainer.predict` that stores the log-probs of a policy on stored rollouts.

    They are those of the sampled tokens, and those over the support of the policy `base`, which is everyone's.

    Args:
        name: What the policy is called; `base` comes first.
        rollouts: Directory of the rollout store.
        scores: Directory of the stores of scores, which are called by the policies' names.
        tokenizer: Folder or hub name of the tokenizer that the rollouts were made with.
        max_tokens: Padded tokens of a batch.
        on_finish: Called when the store is finished.

    Raises:
        UserError: If the scores of `base` are missing.
    """

    def __init__(
        self,
        name: str,
        rollouts: Path,
        scores: Path,
        tokenizer: str | Path,
        max_tokens: int,
        on_finish: Callable[[], None] = lambda: None,
    ) -> None:
        base = scores / "base"
        if name != "base" and not Store.exists(base):
            raise UserError(f"{base} is missing: score the policy 'base' first, its support is everyone's")
        settings = {"name": name, "rollouts": Store.open(rollouts).fingerprint}
        if name != "base":
            settings["support"] = Store.open(base).fingerprint
        super().__init__(scores / name, SCORES, settings, on_finish)
        self.name = name
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._rollouts_path = rollouts
        self._base_path = None if name == "base" else base

    def predict_dataloader(self) -> BatchList:
        """See `PredictToStore`.

        Raises:
            UserError: If the policy speaks another vocabulary than the rollouts are written in.
        """
        path = None if self._policy is None else self._policy.policy_path
        vocabulary = load_tokenizer(self.tokenizer).get_vocab()
        if path is not None and has_tokenizer(path) and load_tokenizer(path).get_vocab() != vocabulary:
            raise UserError(
                f"{path} has another vocabulary than {self.tokenizer}: the policy {self.name!r} cannot be asked about "
                "tokens that it does not know"
            )
        return super().predict_dataloader()

    def part_count(self) -> int:
        """See `PredictToStore`."""
        return len(self._parts)

    def part(self, index: int) -> ScoringPart:
        """See `PredictToStore`."""
        return ScoringPart(index, list(micro_batches(self._rollouts, self.max_tokens, self._parts[index])))

    def columns(self, batch: ScoringPart, output: list[Scores]) -> pa.Table:
        """See `PredictToStore`: the rows of the `SCORES` schema."""
        rows = [
            pa.Table.from_pydict(_score_columns(rollouts, scores), schema=SCORES)
            for rollouts, scores in zip(batch.batches, output, strict=True)
        ]
        return pa.concat_tables(rows)

    @cached_property
    def _parts(self) -> list[Tensor]:
        """Rows of the rollouts in each part: of similar length, whatever `max_tokens` is."""
        lengths = self._rollouts.lengths
        tokens = max(PART_TOKENS, int(lengths.max()))
        return partition_step(lengths, micro_batches_needed(lengths, len(lengths), tokens))

    @cached_property
    def _rollouts(self) -> RolloutTable:
        """The rollouts, with the base's support for everyone but the base."""
        table = Store.open(self._rollouts_path, verify=False).table(TOKEN_COLUMNS)
        if self._base_path is None:
            return RolloutTable.from_arrow(table)
        base = Store.open(self._base_path, verify=False).table()
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


def _lists(values: Tensor, lengths: Tensor) -> pa.Array:
    """Flat values as an Arrow array of lists of the given lengths."""
    offsets = offsets_of(lengths).to(torch.int32)
    return pa.ListArray.from_arrays(pa.array(offsets.numpy()), pa.array(values.numpy()))
