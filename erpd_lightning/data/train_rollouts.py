"""The stored rollouts that are trained on: fixed ones, or those of iterations of the policy itself."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..objectives.advantages import group_advantages
from .batching import RolloutTable, ScoreTable
from .loader import StepLoader, micro_batches_needed
from .rescoring import trainer_logps
from .store import TOKEN_COLUMNS, Store, joined

Baseline = Literal["group", "batch"]

Select = Callable[[Tensor, Tensor], Tensor]
"""Says which responses enter the loss: `(N,)` rewards, NaN for what could not be checked, and `(N,)` advantages to
bool `(N,)`."""


def select_all(rewards: Tensor, advantages: Tensor) -> Tensor:
    """What enters the loss of a module that does not say: every response."""
    return torch.ones_like(rewards, dtype=torch.bool)


class Outcomes(NamedTuple):
    """What came of `N` responses.

    Attributes:
        group: `(N,)` long, number of the prompt.
        reward: `(N,)` float32.
        checked: `(N,)` bool, whether the answer could be checked.
    """

    group: Tensor
    reward: Tensor
    checked: Tensor


class TrainRollouts:
    """Fixed stored rollouts, with their advantages.

    Args:
        stores: Directories of the stores, the round's own first.
        scores: Directory with the scores of policies on them; None for none.
        baseline: What a reward is compared with: those of its group, or of all rollouts of its store.
        correct_threshold: Reward from which a response counts as correct.
    """

    iterations = 1
    """Parts of the prompts, each with rollouts of its own."""
    iteration = 1
    """The part whose rollouts are trained on, from 1."""

    def __init__(
        self, stores: Sequence[Path], scores: Path | None, baseline: Baseline, correct_threshold: float = 1.0
    ) -> None:
        self.stores = list(stores)
        self.scores = scores
        self.baseline = baseline
        self.correct_threshold = correct_threshold

    @property
    def store(self) -> Path:
        """The store that is sampled where it is missing: the round's own, or the iteration's."""
        return self.stores[0]

    @property
    def train_stores(self) -> list[Path]:
        """The stores that are trained on at present."""
        return self.stores

    @property
    def finished_stores(self) -> list[Path]:
        """The stores that there are: a training that stops early leaves out those of later iterations."""
        return [path for path in self.stores if Store.exists(path)]

    @cached_property
    def table(self) -> RolloutTable:
        """The rollouts, with the scores of policies where there are any."""
        stores = [Store.open(path) for path in self.train_stores]
        scores = {} if self.scores is None else self._read_scores(self.scores, stores[0].fingerprint)
        return RolloutTable.from_arrow(joined(stores, TOKEN_COLUMNS), scores, trainer_logps(stores))

    @cached_property
    def outcomes(self) -> Outcomes:
        """What came of the responses; it is read without their tokens."""
        table = joined([Store.open(path, verify=False) for path in self.train_stores], Outcomes._fields)
        return Outcomes(*(torch.tensor(table[name].to_numpy()) for name in Outcomes._fields))

    @cached_property
    def advantages(self) -> Tensor:
        """`(N,)` advantages over the baseline; 0 for what could not be checked, which the baseline leaves out."""
        groups, rewards, checked = self.outcomes
        compared = groups if self.baseline == "group" else self._store_numbers
        advantages = torch.zeros(len(checked))
        advantages[checked] = group_advantages(rewards[checked], compared[checked])
        return advantages

    def selected(self, select: Select) -> Tensor:
        """Rows of the responses that enter the loss; it may be none."""
        # Neither correct nor incorrect: a flipped reward must not turn what could not be checked into either.
        rewards = self.outcomes.reward.where(self.outcomes.checked, torch.nan)
        return select(rewards, self.advantages).nonzero()[:, 0]

    def clear_cache(self) -> None:
        """Read the stores again when they are next needed: one of them has changed."""
        for name in ("table", "outcomes", "advantages"):
            self.__dict__.pop(name, None)

    def begin_epoch(self, epoch: int) -> None:
        """Go to the rollouts of an epoch, from 0."""

    def begins_iteration(self, epoch: int) -> bool:
        """Whether an epoch is the first of an iteration; of fixed rollouts each epoch is one."""
        return True

    def loader(
        self,
        select: Select,
        *,
        batch_size: int,
        max_tokens: int,
        min_micro_batches: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> StepLoader:
        """This rank's micro-batches of what enters the loss, shuffled anew in each epoch.

        Args:
            select: Says which responses enter the loss.
            batch_size: Responses per optimiser step, over all ranks.
            max_tokens: Padded tokens of a micro-batch.
            min_micro_batches: The fewest micro-batches of a rank in a step.
            rank: This process, from 0.
            world_size: How many processes there are.
            seed: Seed of the order.

        Raises:
            UserError: If no response enters the loss.
        """
        table = self.table
        if self.correct_threshold <= 0:  # What could not be checked is stored as 0, and never correct.
            rewards = table.rewards.where(self.outcomes.checked, self.correct_threshold - 1)
            table = replace(table, rewards=rewards)
        rows = self.selected(select)
        if len(rows) == 0:
            rows = self._rows_without_any()
        needed = micro_batches_needed(table.lengths[rows], batch_size, max_tokens)
        return StepLoader(
            partial(table.batch, advantages=self.advantages),
            table.lengths,
            table.response_lengths,
            rows,
            batch_size=batch_size,
            micro_batches=max(-(-needed // world_size), min_micro_batches),
            rank=rank,
            world_size=world_size,
            seed=seed,
            shuffle=True,
        )

    def _rows_without_any(self) -> Tensor:
        """What is trained on where no response enters the loss."""
        checked = self.outcomes.checked
        rewards, responses = self.outcomes.reward[checked], len(checked)
        correct = int((rewards >= self.correct_threshold).sum())
        counted = f"{responses} responses"
        if 0 < len(rewards) < responses:
            counted = f"{len(rewards)} responses that could be checked, of {responses},"
        if len(rewards) == 0:
            problem = f"none of {counted} could be checked; look at the answers and the verifier"
        elif correct == 0:
            problem = f"none of {counted} is correct; sample easier prompts, or more responses to each (group_size)"
        elif correct == len(rewards):
            problem = f"all of {counted} are correct; sample harder prompts"
        else:
            problem = (
                f"no {self.baseline} has both correct and incorrect answers ({correct / len(rewards):.0%} of "
                f"{counted} are correct); sample other prompts, or more responses to each (group_size)"
            )
        raise UserError(f"{self.store}: no response enters the loss: {problem}")

    def _read_scores(self, folder: Path, fingerprint: str) -> dict[str, ScoreTable]:
        tables = {}
        for path in sorted(path for path in folder.glob("*") if Store.exists(path)):
            store = Store.open(path)
            if store.metadata["rollouts"] != fingerprint:
                raise UserError(f"{path} scores other rollouts than those in {self.store}")
            tables[path.name] = ScoreTable.from_arrow(store.table())
        return tables

    @property
    def _store_numbers(self) -> Tensor:
        """`(N,)` long, which of the stores a response is from."""
        sizes = torch.tensor([Store.open(path, verify=False).rows for path in self.train_stores])
        return torch.arange(len(sizes)).repeat_interleave(sizes)


class OnPolicyRollouts(TrainRollouts):
    """Rollouts of the policy that is trained: the prompts in parts, each answered by it when its turn comes.

    Args:
        root: Directory of the stores, one an iteration.
        iterations: Parts of the prompts.
        baseline: What a reward is compared with: those of its group, or of all rollouts of its iteration.
        correct_threshold: Reward from which a response counts as correct.
    """

    def __init__(self, root: Path, iterations: int, baseline: Baseline, correct_threshold: float = 1.0) -> None:
        numbers = range(1, iterations + 1)
        super().__init__([root / f"iteration-{number:04}" for number in numbers], None, baseline, correct_threshold)
        self.iterations = iterations
        self._epochs_per_iteration = 1

    @property
    def store(self) -> Path:
        """See `TrainRollouts`."""
        return self.stores[self.iteration - 1]

    @property
    def train_stores(self) -> list[Path]:
        """See `TrainRollouts`: that of the iteration."""
        return [self.store]

    def share_out(self, trainer: Any) -> None:
        """Train on each part for as many of a trainer's epochs, which asks for a loader in each of them.

        Raises:
            UserError: If the epochs are no multiple of the parts.
        """
        epochs = trainer.max_epochs
        if epochs < 1 or (epochs % self.iterations and not trainer.fast_dev_run):
            raise UserError(
                f"max_epochs is {epochs}: it must be a multiple of iterations ({self.iterations}), "
                "each of which is trained on for as many epochs"
            )
        trainer.reload_dataloaders_every_n_epochs = 1
        self._epochs_per_iteration = max(1, epochs // self.iterations)

    def begin_epoch(self, epoch: int) -> None:
        """See `TrainRollouts`."""
        iteration = 1 + epoch // self._epochs_per_iteration
        if iteration != self.iteration:
            self.iteration = iteration
            self.clear_cache()

    def begins_iteration(self, epoch: int) -> bool:
        """See `TrainRollouts`."""
        return epoch % self._epochs_per_iteration == 0

    def _rows_without_any(self) -> Tensor:
        """See `TrainRollouts`: a step that teaches nothing, for the next part may."""
        return torch.zeros(1, dtype=torch.long)
