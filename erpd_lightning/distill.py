"""Stage 2: distil the teacher's opinion back into the base policy under a KL budget."""

import math
from dataclasses import astuple
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .data.batching import RolloutBatch, RolloutTable
from .errors import UserError
from .line import Landing, Line, land
from .objectives.distillation import DistillObjective, TiltedTarget
from .objectives.signal import AutoSignal, Signal
from .objectives.tilt import (
    TwoAnchorSolution,
    UnreachableBudget,
    between,
    solve_beta,
    solve_two_anchors,
)
from .policy_module import PolicyModule

# A student that is just starting has spent next to nothing: that says little about where it will end.
MAX_CORRECTION = 1.5


class DistillModule(PolicyModule):
    """Distils a signal into the base policy; beta is solved for the budget and reported.

    The stored states are not those that a student meets: on prompts that it was not trained on it spends a little
    more or less than its target does on the stored ones. With `calibrate`, the student's KL on fresh samples of
    unused training prompts, exact over the vocabulary, corrects beta after every epoch. After the last one it moves
    the student along the line to the base policy until the budget is what it spends (see `line`). Ours.

    Args:
        policy: Folder or hub name of the base policy, which the student starts from.
        kl_budget: KL of the target to the base policy to spend, in nats per response token on the stored states.
        total_budget: KL of the target to the first policy of all rounds, in nats per response token, that is not to
            be exceeded either; None for no such bound. It takes the scores and the reference of a policy `first`.
        beta: Price of a nat of KL, where it is given and not solved; `kl_budget` is then None.
        signal: What the policies say about a token, as clipped log-ratios; `auto`, or an `AutoSignal`, for one that
            the chain chooses by preview.
        objective: How the student is drawn to the tilted base policy.
        calibrate: Correct beta after each epoch and the weights after the last, so that the budget is spent on fresh
            samples and not only on the stored states; needs a solved beta, a student that starts from the policy
            that its KL is measured to, and a `RolloutDataModule` with `calibration_prompts`.
        learning_rate: AdamW's learning rate after warm-up.
        lr_scheduler: What follows warm-up, by its name in `transformers.get_scheduler`.
        **kwargs: Further arguments of `PolicyModule`.

    Raises:
        UserError: For a budget or beta that is not a positive number, both or none of them.
    """

    def __init__(
        self,
        policy: str | Path,
        kl_budget: float | None = 0.05,
        total_budget: float | None = None,
        beta: float | None = None,
        signal: Signal | Literal["auto"] | None = None,
        objective: DistillObjective | None = None,
        calibrate: bool = True,
        learning_rate: float = 1e-3,
        lr_scheduler: str = "cosine",
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, learning_rate=learning_rate, lr_scheduler=lr_scheduler, **kwargs)
        for name, value in (("kl_budget", kl_budget), ("total_budget", total_budget), ("beta", beta)):
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"distill.{name} is {value}: it must be a positive, finite number")
        if (kl_budget is None) == (beta is None):
            raise UserError("give either distill.kl_budget or distill.beta, and leave the other null")
        if total_budget is not None and kl_budget is None:
            raise UserError("distill.total_budget goes with distill.kl_budget, not with a given distill.beta")
        self.kl_budget = kl_budget
        self.total_budget = total_budget
        self.beta = beta
        self.signal = AutoSignal() if signal == "auto" else signal or Signal()
        if isinstance(self.signal, AutoSignal) and kl_budget is None:
            raise UserError("distill.signal is chosen for distill.kl_budget, not for a given distill.beta")
        self.objective = objective or TiltedTarget()
        self.solution: TwoAnchorSolution | None = None
        self.landing: Landing | None = None
        self.calibrates = calibrate and beta is None and self.references.get("base") == str(policy)
        self._log_gains: list[float] = []
        self._due = False

    def setup(self, stage: str) -> None:
        """Solve beta for the budget on the stored states."""
        if stage != "fit" or self.solution is not None:
            return
        if isinstance(self.signal, AutoSignal):
            raise UserError("distill.signal is chosen by the chain of stages: give a Signal in a Trainer of your own")
        data: Any = getattr(self.trainer, "datamodule", None)
        rollouts = getattr(data, "rollouts", None)
        if rollouts is None or not rollouts.scores:
            raise UserError(
                "distillation needs rollouts with scores: RolloutDataModule(scores=…), "
                "filled by Trainer.predict with its scoring(name)"
            )
        self._check_policies(rollouts)
        if self.kl_budget is not None:
            self._solve(rollouts, gain=1.0)

    def on_validation_epoch_end(self) -> None:
        """Note what the student spends on fresh samples of the calibration prompts."""
        super().on_validation_epoch_end()
        metrics: Any = self.metrics["calibration"]
        if len(metrics) == 0:
            return
        spent = float(metrics["kl_per_token/base"].compute().value)
        self._log_metrics("calibration")
        if spent > 0 and not self.trainer.sanity_checking:
            assert self.solution is not None
            self._log_gains.append(math.log(spent / self.solution.kl_base))
            self._due = True

    def on_train_epoch_start(self) -> None:
        """Correct beta, once there is an epoch to train with it: what is reported is what was trained with."""
        if self._due:
            self._due = False
            self._correct()

    def on_fit_end(self) -> None:
        """Move along the line to the base policy until fresh samples say that the budget is spent.

        Not in the last epoch: checkpoints hold what was trained, and a run that is killed here lands the same again.
        """
        trainer: Any = self.trainer
        if self.calibrates and trainer.datamodule.calibration() and not trainer.fast_dev_run:
            assert self.kl_budget is not None  # What is measured is in units of it, whichever budget is tighter.
            line, attempts = Line(self.frozen("base"), self.policy), count()
            with self._evaluating():
                self.landing = land(lambda share: self._spent(line, share, next(attempts)), self.kl_budget)
            line.move_to(self.landing.share)
        self.release_frozen()

    def _spent(self, line: Line, share: float, attempt: int) -> float:
        """The KL of a place on the line on fresh samples of the calibration prompts, in nats per token.

        Where the total budget is the tighter one, the same share of `kl_budget` as is spent of that.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        line.move_to(share)
        metrics: Any = self.metrics["calibration"]
        for batch in data.calibration_batches(f"landing {attempt}"):
            self.evaluate(batch, metrics)
        spent = float(metrics["kl_per_token/base"].compute().value)
        if self.total_budget is not None:
            assert self.kl_budget is not None
            total = float(metrics["kl_per_token/first"].compute().value)
            spent = max(spent, total / self.total_budget * self.kl_budget)
        for metric in metrics.values():
            metric.reset()
        return spent

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep beta and what calibration found so far."""
        super().on_save_checkpoint(checkpoint)
        solution = None if self.solution is None else astuple(self.solution)
        checkpoint["calibration"] = {
            "solution": solution,
            "log_gains": list(self._log_gains),
            "due": self._due,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with them."""
        super().on_load_checkpoint(checkpoint)
        if "calibration" not in checkpoint:
            raise UserError("the checkpoint is not one of a distillation: it holds no beta")
        calibration = checkpoint["calibration"]
        self._log_gains, self._due = calibration["log_gains"], calibration["due"]
        if calibration["solution"] is not None:
            self._take(TwoAnchorSolution(*calibration["solution"]))

    def _correct(self) -> None:
        """Solve beta again for the share of the budget that, at the gain seen lately, spends all of it.

        The gain is the student's KL on fresh samples over its target's on the stored states. The geometric mean of
        the last two damps the noise of a sample.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        recent = self._log_gains[-2:]
        gain = min(max(math.exp(sum(recent) / len(recent)), 1 / MAX_CORRECTION), MAX_CORRECTION)
        try:
            self._solve(data.rollouts, gain)
        except UserError:
            return  # A student this thrifty cannot be made to spend more: beta stays where it is.

    def _solve(self, rollouts: RolloutTable, gain: float) -> None:
        """The prices that spend the budgets, each over the gain, on the states of some scored rollouts.

        Raises:
            UserError: If none do.
        """
        assert self.kl_budget is not None
        logps = {name: rollouts.flat_scores(name) for name in self._scored}
        base, signal = logps["base"], self.signal(logps)
        try:
            if self.total_budget is None:
                found = solve_beta(base, signal, self.kl_budget / gain)
                self._take(TwoAnchorSolution(found.beta, 0.0, found.kl, math.nan))
            else:
                budgets = (self.kl_budget / gain, self.total_budget / gain)
                self._take(solve_two_anchors(base, logps["first"], signal, *budgets))
        except UnreachableBudget as error:
            raise UserError(f"distill.kl_budget: {error}") from error

    def _take(self, solution: TwoAnchorSolution) -> None:
        self.solution = solution
        self.beta = solution.beta_base + solution.beta_first

    @property
    def _scored(self) -> set[str]:
        """The policies whose scores it takes."""
        return {"base", *self.signal.policies, *(["first"] if self.total_budget is not None else [])}

    def select(self, rewards: Tensor, advantages: Tensor) -> Tensor:
        """See `PolicyModule.select`: every stored response holds states to learn in."""
        return torch.ones_like(rewards, dtype=torch.bool)

    def terms(self, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `PolicyModule.terms`: the objective between student and tilted base policy."""
        assert batch.scores is not None
        assert batch.support_ids is not None
        assert self.beta is not None
        hidden = self.policy.hidden(batch)
        student = self.policy.support_logps(batch, batch.support_ids, hidden)
        terms = self.objective(student, self._anchor(batch.scores), self.signal(batch.scores), self.beta)
        return terms, {}

    def _anchor(self, scores: dict[str, Tensor]) -> Tensor:
        """What the signal tilts: the base policy, or what lies between it and the first one."""
        if self.solution is None or self.solution.beta_first == 0:
            return scores["base"]
        assert self.beta is not None
        return between(scores["base"], scores["first"], self.solution.beta_base / self.beta)

    def _check_policies(self, rollouts: RolloutTable) -> None:
        missing = self._scored - rollouts.scores.keys()
        if missing:
            raise UserError(
                f"distill uses the policies {', '.join(sorted(missing))}, which were not scored; "
                f"there are {', '.join(sorted(rollouts.scores))}"
            )
