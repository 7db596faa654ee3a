"""`TrainLoader`: the loader of a training, made for each of its iterations and put where a checkpoint was saved."""

from typing import Any

from ..errors import UserError
from .loader import StepLoader
from .ranks import ranks
from .train_rollouts import Select, TrainRollouts


class TrainLoader:
    """The `StepLoader` that a trainer trains on: how its steps are cut, and how far into the epoch training is.

    A training has one. With iterations a new `StepLoader` is made in each epoch.
    """

    def __init__(self) -> None:
        self.steps: StepLoader | None = None
        self._iteration = 1
        self._resume_state: dict[str, int] | None = None
        self._min_micro_batches = 1

    def make(
        self, trainer: Any, rollouts: TrainRollouts, select: Select, *, batch_size: int, max_tokens: int, seed: int
    ) -> StepLoader:
        """This rank's micro-batches of what enters the loss; the trainer is made to step after those of a step.

        Args:
            trainer: The trainer.
            rollouts: What is trained on.
            select: Says which responses enter the loss.
            batch_size: Responses per optimiser step, over all ranks.
            max_tokens: Padded tokens of a micro-batch.
            seed: Seed of the order.

        Raises:
            UserError: If no response enters the loss, a limit of the trainer ends inside a step, or the checkpoint to
                go on from cut steps otherwise.
        """
        rank, world_size = ranks(trainer)
        self.steps = rollouts.loader(
            select,
            batch_size=batch_size,
            max_tokens=max_tokens,
            min_micro_batches=max(trainer.accumulate_grad_batches, self._min_micro_batches),
            rank=rank,
            world_size=world_size,
            seed=seed,
        )
        trainer.accumulate_grad_batches = self.steps.micro_batches
        _limit_to_whole_steps(trainer, self.steps)
        self._iteration = rollouts.iteration
        self._resume()
        return self.steps

    def check_micro_batches(self, trainer: Any) -> None:
        """Whether the trainer steps after as many micro-batches as a step was cut into.

        Raises:
            UserError: If something, such as a `GradientAccumulationScheduler`, changed their number: losses are divided
                by the tokens of a step.
        """
        if self.steps is not None and trainer.accumulate_grad_batches != self.steps.micro_batches:
            raise UserError(
                f"accumulate_grad_batches was set to {trainer.accumulate_grad_batches} in training, but an optimiser "
                f"step is {self.steps.micro_batches} micro-batches: data.batch_size says how large a step is, take "
                "out the callback that changes it"
            )

    def state_dict(self) -> dict[str, int]:
        """How far into the epoch training is; empty before there is a loader."""
        if self.steps is None:
            return {}
        own = {"micro_batches": self.steps.micro_batches, "iteration": self._iteration}
        return {**self.steps.state_dict(), **own}

    def load_state_dict(self, state: dict[str, int], iterations: int) -> None:
        """Go on from there.

        Args:
            state: That of a checkpoint.
            iterations: Parts of the prompts, each with a loader of its own.

        Raises:
            UserError: If steps were cut into another number of micro-batches then.
        """
        self._resume_state = state or None
        if iterations > 1 and state:
            # The parts before may have needed more micro-batches than those that are read again.
            self._min_micro_batches = state["micro_batches"]
        self._resume()

    def _resume(self) -> None:
        """Put the loader where the checkpoint was saved, once both are there."""
        if self.steps is None or self._resume_state is None:
            return
        if self._resume_state["iteration"] != self._iteration:
            return
        state, self._resume_state = self._resume_state, None
        if state["micro_batches"] != self.steps.micro_batches:
            raise UserError(
                f"the checkpoint was saved with {state['micro_batches']} micro-batches of a process in a step, there "
                f"are {self.steps.micro_batches} now: go on with the same max_tokens, accumulate_grad_batches and "
                "number of processes, or delete the stage's checkpoints"
            )
        self.steps.load_state_dict(state)


def _limit_to_whole_steps(trainer: Any, loader: StepLoader) -> None:
    """Refuse a limit that ends an epoch inside an optimiser step, whose loss is divided by the tokens of all of it.

    And an interval of validations that is longer than an epoch, at which Lightning ends.

    Raises:
        UserError: Names the limit or the interval.
    """
    limit, step, length = trainer.limit_train_batches, loader.micro_batches, len(loader)
    if trainer.fast_dev_run:
        trainer.limit_train_batches = trainer.fast_dev_run * step
        return
    batches = int(limit * length) if isinstance(limit, float) else min(limit, length)
    if batches % step:
        raise UserError(
            f"limit_train_batches (or overfit_batches) is {limit}: {batches} micro-batches of a process, of which an "
            f"optimiser step takes {step}; take a multiple of it"
        )
    interval = trainer.val_check_interval
    if isinstance(interval, int) and interval > batches and trainer.check_val_every_n_epoch is not None:
        raise UserError(
            f"val_check_interval is {interval}, but an epoch has only {batches} micro-batches of a process: take at "
            "most that, or check_val_every_n_epoch: null to count on over epochs"
        )
