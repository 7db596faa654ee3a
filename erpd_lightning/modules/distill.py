"""Stage 2: distil the teacher's opinion back into the base policy under a KL budget."""

import math
from dataclasses import astuple, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..budget.interpolation import Landing, Line, land
from ..data.batching import RolloutBatch, RolloutTable
from ..errors import InvalidArgument, UserError
from ..objectives.distillation import DistillObjective, TiltedTarget, TokenObjective
from ..objectives.divergences import exact_kl
from ..objectives.signal import AutoSignal, Signal
from ..objectives.tilted_policy import UnreachableBudget, mean_tilted_kl, solve_beta
from ..objectives.two_references import TwoReferenceSolution, geometric_mixture, solve_two_references
from .policy_module import SUPPORT_MASS, SUPPORT_SIZE, PolicyModule

# A student that is just starting has spent next to nothing: that says little about where it will end.
MAX_CORRECTION = 1.5

UNRESTRAINED = (
    "is false, and no KL budget brings the student back: it would collapse. Set it to true, or give kl_budget with "
    "calibrate, and calibration_prompts to the data"
)


class DistillModule(PolicyModule):
    """Distils a signal into the base policy; beta is solved for the budget and reported.

    The stored states are not those that a student meets: on prompts that it was not trained on it spends a little
    more or less than its target does on the stored ones. With `calibrate`, the student's KL on fresh samples of
    unused training prompts, exact over the vocabulary, corrects beta after every epoch. After the last one it moves
    the student along the line to the base policy until the budget is what it spends (see `line`). Ours.

    With several `iterations` the student learns from its own answers: the round's prompts are cut into as many parts,
    each answered by the student as it is when its turn comes. The policies of the signal are then asked about them as
    it is trained, frozen beside it in memory. Beta is still solved on the stored and scored rollouts.

    Args:
        policy: Folder or hub name of the base policy, which the student starts from.
        kl_budget: KL of the target to the base policy to spend, in nats per response token on the stored states.
        total_budget: KL of the target to the first policy of all rounds, in nats per response token, that is not to
            be exceeded either; None for no such bound. It takes the scores and the reference of a policy `first`.
        beta: Price of a nat of KL, where it is given and not solved; `kl_budget` is then None.
        min_beta: The beta below which no KL is worth its price: where the target spends less than the budget at it,
            that is what there is to spend. A signal says less from round to round, and to spend as much on it takes a
            beta at which its noise counts. None for no such bound.
        signal: What the policies say about a token, as clipped log-ratios; `auto`, or an `AutoSignal`, for one that
            the chain chooses by preview.
        objective: How the student is drawn to the tilted base policy: over the support of each state, or by the
            signal of the sampled tokens, for which pi_old is the student as it was when the iteration began: the
            epoch on stored rollouts, the part of the prompts on its own.
        iterations: Parts of the round's prompts that the student answers itself; 1 for the stored rollouts alone.
            The trainer's `max_epochs` are shared out evenly, so that `max_epochs / iterations` epochs are trained on
            each. It takes a `RolloutDataModule` with a directory `fresh`.
        policies: Folders or hub names of the policies of the signal, by name, for several `iterations`.
        calibrate: Correct beta after each epoch and the weights after the last, so that the budget is spent on fresh
            samples and not only on the stored states; needs a solved beta, a student that starts from the policy
            that its KL is measured to, and a `RolloutDataModule` with `calibration_prompts`.
        learning_rate: AdamW's learning rate after warm-up.
        lr_scheduler: What follows warm-up, by its name in `transformers.get_scheduler`.
        **kwargs: Further arguments of `PolicyModule`.

    Raises:
        UserError: For a budget or beta that is not a positive number, both or none of them, or an objective without
            a KL term and nothing else that keeps the student near the base policy.
    """

    def __init__(
        self,
        policy: str | Path,
        kl_budget: float | None = 0.05,
        total_budget: float | None = None,
        beta: float | None = None,
        min_beta: float | None = None,
        signal: Signal | Literal["auto"] | None = None,
        objective: DistillObjective | None = None,
        iterations: int = 1,
        policies: dict[str, str] | None = None,
        calibrate: bool = True,
        learning_rate: float = 1e-3,
        lr_scheduler: str = "cosine",
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, learning_rate=learning_rate, lr_scheduler=lr_scheduler, **kwargs)
        prices = {"kl_budget": kl_budget, "total_budget": total_budget, "beta": beta, "min_beta": min_beta}
        for name, value in prices.items():
            if value is not None and not 0 < value < float("inf"):
                raise InvalidArgument(name, f"is {value}: it must be a positive, finite number")
        if (kl_budget is None) == (beta is None):
            raise InvalidArgument(
                "kl_budget", f"is {kl_budget} and beta is {beta}: give one of them, and leave the other null"
            )
        if total_budget is not None and kl_budget is None:
            raise InvalidArgument("total_budget", "goes with kl_budget, not with a given beta")
        if min_beta is not None and (kl_budget is None or total_budget is not None):
            raise InvalidArgument("min_beta", "goes with kl_budget alone, not with beta or total_budget")
        if objective is not None and getattr(objective, "needs", None) not in ("support", "tokens"):
            raise InvalidArgument(
                "objective", f"is {type(objective).__name__}: it must be a DistillObjective or a TokenObjective"
            )
        if iterations < 1:
            raise InvalidArgument("iterations", f"is {iterations}: it must be at least 1")
        self.kl_budget = kl_budget
        self.total_budget = total_budget
        self.beta = beta
        self.min_beta = min_beta
        self.to_spend = kl_budget
        self.signal = AutoSignal() if signal == "auto" else signal or Signal()
        if isinstance(self.signal, AutoSignal) and kl_budget is None:
            raise InvalidArgument("signal", "is auto: it is chosen for kl_budget, not for a given beta")
        if isinstance(self.signal, AutoSignal) and min_beta is not None:
            raise InvalidArgument(
                "min_beta", "is a price for one signal, but signal is auto: it is chosen among several"
            )
        self.objective = objective or TiltedTarget()
        self.iterations = iterations
        self.policies = policies or {}
        self.solution: TwoReferenceSolution | None = None
        self.landing: Landing | None = None
        self.calibrates = calibrate and beta is None and self.references.get("base") == str(policy)
        self._log_gains: list[float] = []
        self._due = False
        if self.unrestrained and not (calibrate and kl_budget is not None):
            raise InvalidArgument("objective.kl_term", UNRESTRAINED)

    @property
    def re_anchors(self) -> bool:  # type: ignore[override]
        """Whether its objective has an importance ratio, whose anchor is taken again in every iteration."""
        return self.objective.needs == "tokens"

    @property
    def unrestrained(self) -> bool:
        """Whether nothing in the loss keeps the student near the base policy."""
        return self.objective.needs == "tokens" and not self.objective.kl_term

    def setup(self, stage: str) -> None:
        """Solve beta for the budget on the stored states."""
        if stage != "fit":
            return
        if isinstance(self.signal, AutoSignal):
            raise UserError("distill.signal is chosen by the chain of stages: give a Signal in a Trainer of your own")
        data: Any = getattr(self.trainer, "datamodule", None)
        if self.iterations > 1:
            self._check_paths()
        if self.unrestrained and not (self.calibrates and data is not None and data.calibration()):
            raise InvalidArgument("objective.kl_term", UNRESTRAINED)
        if self.solution is not None or (self.iterations > 1 and self.kl_budget is None):
            return
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
        super().on_train_epoch_start()
        if self._due:
            self._due = False
            self._correct()

    def on_validation_end(self) -> None:
        """Keep the frozen policies where they are asked about what the student answers."""
        if self.iterations == 1:
            self.release_frozen()

    def settle(self) -> None:
        """Move along the line to the base policy until fresh samples say that the budget is spent."""
        trainer: Any = self.trainer
        if self.calibrates and trainer.datamodule.calibration() and not trainer.fast_dev_run:
            assert self.to_spend is not None  # What is measured is in units of it, whichever budget is tighter.
            line, attempts = Line(self.frozen("base").parameters(), self.policy.parameters()), count()
            with self._evaluating():
                self.landing = land(lambda share: self._spent(line, share, next(attempts)), self.to_spend)
            line.move_to(self.landing.share)

    def _spent(self, line: Line, share: float, attempt: int) -> float:
        """The KL of a place on the line on fresh samples of the calibration prompts, in nats per token.

        Where the total budget is the tighter one, the same share of what is to be spent as is spent of that.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        line.move_to(share)
        metrics: Any = self.metrics["calibration"]
        for batch in data.calibration_batches(f"landing {attempt}"):
            self.evaluate(batch, metrics)
        spent = float(metrics["kl_per_token/base"].compute().value)
        if self.total_budget is not None:
            assert self.to_spend is not None
            total = float(metrics["kl_per_token/first"].compute().value)
            spent = max(spent, total / self.total_budget * self.to_spend)
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
            self._take(TwoReferenceSolution(*calibration["solution"]))

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
        self.to_spend = self.kl_budget
        if self.min_beta is not None and (most := mean_tilted_kl(base, signal, self.min_beta)) > 0:
            self.to_spend = min(self.kl_budget, most)
        try:
            if self.total_budget is None:
                found = solve_beta(base, signal, self.to_spend / gain)
                self._take(TwoReferenceSolution(found.beta, 0.0, found.kl, math.nan))
            else:
                budgets = (self.to_spend / gain, self.total_budget / gain)
                self._take(solve_two_references(base, logps["first"], signal, *budgets))
        except UnreachableBudget as error:
            raise UserError(f"distill.kl_budget: {error}") from error

    def _take(self, solution: TwoReferenceSolution) -> None:
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
        """See `PolicyModule.terms`: the objective between student and tilted base policy, or of the sampled tokens."""
        assert self.beta is not None
        if self.iterations > 1:
            batch = self._ask(batch)
        hidden = self.policy.hidden(batch)
        if self.objective.needs == "tokens":
            return self._token_terms(self.objective, batch, hidden)
        assert batch.scores is not None
        student, anchor = self._student(batch, hidden), self._anchor(batch.scores)
        kl = exact_kl(student.detach(), batch.scores["base"])
        return self.objective(student, anchor, self.signal(batch.scores), self.beta), {"kl": kl}

    def _token_terms(
        self, objective: TokenObjective, batch: RolloutBatch, hidden: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of the sampled tokens."""
        assert batch.token_scores is not None
        assert self.beta is not None
        logps, old = self.policy.token_logps(batch, hidden).logps, self._old.logps(batch)
        signal = self.signal(batch.token_scores)
        kl = self._kl(batch, hidden) if objective.kl_term else torch.zeros_like(logps)
        terms = objective(logps, old, batch.anchor_logps, signal, kl, self.beta)
        values = {"signal": signal, "log_ratio": logps - old}
        return terms, {**values, "kl": kl} if objective.kl_term else values

    def _kl(self, batch: RolloutBatch, hidden: Tensor) -> Tensor:
        """KL of the student to the base policy, `(B, T)` in nats; with two anchors the mean by their prices.

        Over support and tail where they are stored, over the vocabulary where the base policy is at hand.
        """
        if batch.scores is not None:
            return exact_kl(self._student(batch, hidden), self._anchor(batch.scores))
        kl = self.policy.divergence(self.frozen("base"), batch, hidden).kl
        if self._base_share == 1:
            return kl
        return torch.lerp(self.policy.divergence(self.frozen("first"), batch, hidden).kl, kl, self._base_share)

    def _student(self, batch: RolloutBatch, hidden: Tensor) -> Tensor:
        assert batch.support_ids is not None
        return self.policy.support_logps(batch, batch.support_ids, hidden)

    @torch.no_grad()
    def _ask(self, batch: RolloutBatch) -> RolloutBatch:
        """What the frozen policies say of a batch that the student answered: what its objective takes."""
        names = self.signal.policies if self.re_anchors else sorted(self._scored)
        hidden = {name: self.frozen(name).hidden(batch) for name in names}
        if self.re_anchors:
            logps = {name: self.frozen(name).token_logps(batch, hidden[name]).logps for name in names}
            return replace(batch, token_scores=logps)
        ids = self.frozen("base").select_support(batch, SUPPORT_MASS, SUPPORT_SIZE, hidden["base"])
        scores = {name: self.frozen(name).support_logps(batch, ids, hidden[name]) for name in names}
        return replace(batch, scores=scores, support_ids=ids)

    def _anchor(self, scores: dict[str, Tensor]) -> Tensor:
        """What the signal tilts: the base policy, or what lies between it and the first one."""
        if self._base_share == 1:
            return scores["base"]
        return geometric_mixture(scores["base"], scores["first"], self._base_share)

    @property
    def _base_share(self) -> float:
        """The base policy's share of beta; the rest is the price of KL to the first policy."""
        if self.solution is None or self.solution.beta_first == 0:
            return 1.0
        assert self.beta is not None
        return self.solution.beta_base / self.beta

    @property
    def _paths(self) -> dict[str, str]:
        """See `PolicyModule`: the policies of the signal too."""
        return {"base": str(self.policy_path), **self.policies, **self.references}

    def _check_paths(self) -> None:
        if missing := self._scored - self._paths.keys():
            raise UserError(
                f"distill.iterations is {self.iterations}: what the student answers is scored as it is trained, but "
                f"distill.policies names no {', '.join(sorted(missing))}"
            )

    def _check_policies(self, rollouts: RolloutTable) -> None:
        missing = self._scored - rollouts.scores.keys()
        if missing:
            raise UserError(
                f"distill uses the policies {', '.join(sorted(missing))}, which were not scored; "
                f"there are {', '.join(sorted(rollouts.scores))}"
            )
