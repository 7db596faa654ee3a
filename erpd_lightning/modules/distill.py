"""Stage 2: distil the teacher's opinion back into the base policy under a KL budget."""

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ..budget.controller import BudgetController, spending_warning
from ..budget.interpolation import WeightInterpolation
from ..budget.search import Measurement
from ..data.batching import RolloutBatch, RolloutTable, replaced
from ..errors import InvalidArgument, UserError, check_at_least
from ..models.checks import is_finite
from ..objectives.distillation import DistillObjective, TiltedTarget, TokenObjective
from ..objectives.divergences import exact_kl
from ..objectives.signal import AutoSignal, Signal
from ..objectives.two_references import geometric_mixture
from .eval_mode import eval_mode
from .scoring import SUPPORT_MASS, SUPPORT_SIZE
from .training import TrainingDiverged, TrainingModule

KLS = ("kl_per_token/base", "kl_per_token/first")
"""The metrics of what is spent of the two budgets."""

UNRESTRAINED = (
    "is false, and no KL budget brings the student back: it would collapse. Set it to true, or give kl_budget with "
    "calibrate, and calibration_prompts to the data"
)


class DistillModule(TrainingModule):
    """Distils a signal into the base policy; beta is solved for the budget and reported.

    The stored states are not those that a student meets: on prompts that it was not trained on it spends a little
    more or less than its target does on the stored ones. With `calibrate`, the student's KL on fresh samples of
    unused training prompts, exact over the vocabulary, corrects beta after every epoch. After the last one it moves
    the student between the base policy and itself to where the budget is what it spends (see `budget`). Ours.

    With several `iterations` the student learns from its own answers: the round's prompts are cut into as many parts,
    each answered by the student as it is when its turn comes. The policies of the signal are then asked about them as
    it is trained, frozen beside it in memory. Beta is still solved on the stored and scored rollouts.

    What is spent in the end is measured once more. Where a student is surely outside its budget, or far from spending
    it, that is a warning, kept in `reasons`.

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
            each. It takes a `RolloutDataModule` with an `on_policy_store`.
        policies: Folders or hub names of the policies of the signal, by name, for several `iterations`.
        calibrate: Correct beta after each epoch and the weights after the last, so that the budget is spent on fresh
            samples and not only on the stored states; needs a solved beta, a student that starts from the policy
            that its KL is measured to, and a `RolloutDataModule` with `calibration_prompts`.
        learning_rate: AdamW's learning rate after warm-up.
        lr_scheduler: What follows warm-up, by its name in `transformers.get_scheduler`.
        **kwargs: Further arguments of `TrainingModule`.

    Raises:
        InvalidArgument: For a budget or beta that is not a positive number, both or none of them, or an objective
            without a KL term and nothing else that keeps the student near the base policy.
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
        self.budget = BudgetController(kl_budget, total_budget, beta, min_beta)
        self.signal = AutoSignal() if signal == "auto" else signal or Signal()
        if isinstance(self.signal, AutoSignal) and kl_budget is None:
            raise InvalidArgument("signal", "is auto: it is chosen for kl_budget, not for a given beta")
        if isinstance(self.signal, AutoSignal) and min_beta is not None:
            raise InvalidArgument(
                "min_beta", "is a price for one signal, but signal is auto: it is chosen among several"
            )
        self.objective: DistillObjective = objective or TiltedTarget()
        if getattr(self.objective, "needs", None) not in ("support", "tokens"):
            raise InvalidArgument(
                "objective", f"is {type(self.objective).__name__}: it must be a SupportObjective or a TokenObjective"
            )
        check_at_least(1, iterations=iterations)
        self.reasons: list[str] = []
        self.iterations = iterations
        self.policies = policies or {}
        self.calibrates = calibrate and beta is None and self.references.get("base") == str(policy)
        if self.unrestrained and not (calibrate and kl_budget is not None):
            raise InvalidArgument("objective.kl_term", UNRESTRAINED)

    @property
    def beta(self) -> float | None:
        """Price of a nat of KL to the base policy: the given one, or the one that was solved last."""
        return self.budget.beta

    @beta.setter
    def beta(self, value: float) -> None:
        self.budget.beta = value

    @property
    def kl_budget(self) -> float | None:
        """KL of the target to the base policy to spend, in nats per token."""
        return self.budget.kl_budget

    @property
    def refreshes_old_logps(self) -> bool:  # type: ignore[override]
        """Whether its objective has an importance ratio, whose old log-probs are taken again in every iteration."""
        return self.objective.needs == "tokens"

    @property
    def unrestrained(self) -> bool:
        """Whether nothing in the loss keeps the student near the base policy."""
        return self.objective.needs == "tokens" and not self.objective.kl_term

    @property
    def reference_paths(self) -> dict[str, str]:
        """See `PolicyModule`: the policies of the signal too."""
        return {"base": str(self.policy_path), **self.policies, **self.references}

    # Set-up: beta is solved for the budget on the stored states.

    def setup(self, stage: str) -> None:
        """Solve beta for the budget on the stored states."""
        super().setup(stage)
        if stage != "fit":
            return
        if isinstance(self.signal, AutoSignal):
            raise InvalidArgument(
                "signal", "is auto: it is chosen by the chain of stages; give a Signal in your own Trainer"
            )
        data = self._rollout_data
        if self.iterations > 1:
            self._check_paths()
        if self.unrestrained and not (self.calibrates and data is not None and data.prompt_plan.calibration):
            raise InvalidArgument("objective.kl_term", UNRESTRAINED)
        if self.budget.solution is not None or (self.iterations > 1 and self.budget.kl_budget is None):
            return
        if data is None or not data.rollouts.scores:
            raise UserError(
                "distillation needs rollouts with scores: RolloutDataModule(scores=…), "
                "filled by Trainer.predict with its scoring(name)"
            )
        self._check_policies(data.rollouts)
        if self.budget.kl_budget is not None:
            self.budget.solve(*self._stored_states(data.rollouts))

    def _stored_states(self, rollouts: RolloutTable) -> tuple[Mapping[str, Tensor], Tensor]:
        """Log-probs by policy, and the signal, of the scored states of some rollouts."""
        logps = {name: rollouts.flat_scores(name) for name in self._scored}
        return logps, self.signal(logps)

    @property
    def _scored(self) -> set[str]:
        """The policies whose scores it takes."""
        return {"base", *self.signal.policies, *(["first"] if self.budget.total_budget is not None else [])}

    def _check_paths(self) -> None:
        if missing := self._scored - self.reference_paths.keys():
            raise InvalidArgument(
                "iterations",
                f"is {self.iterations}: what the student answers is scored as it is trained, but policies names no "
                f"{', '.join(sorted(missing))}",
            )

    def _check_policies(self, rollouts: RolloutTable) -> None:
        missing = self._scored - rollouts.scores.keys()
        if missing:
            raise UserError(
                f"distillation uses the policies {', '.join(sorted(missing))}, which were not scored; "
                f"there are {', '.join(sorted(rollouts.scores))}"
            )

    # The budget: corrected by what validation measures, and met by a last step between the weights.

    def on_validation_epoch_end(self) -> None:
        """Note what the student spends on fresh samples of the calibration prompts."""
        super().on_validation_epoch_end()
        metrics: Any = self.metrics["calibration"]
        if len(metrics) == 0:
            return
        spent = float(metrics["kl_per_token/base"].compute().value)
        self._log_metrics("calibration")
        if not self.trainer.sanity_checking:
            self.budget.observe(spent)

    def on_train_epoch_start(self) -> None:
        """Correct beta, once there is an epoch to train with it: what is reported is what was trained with."""
        super().on_train_epoch_start()
        if self.budget.correction_due:
            assert self._rollout_data is not None
            self.budget.correct(*self._stored_states(self._rollout_data.rollouts))

    def on_validation_end(self) -> None:
        """Keep the references where they are asked about what the student answers."""
        if self.iterations == 1:
            self.release_references()

    def finalize_weights(self) -> None:
        """Move between the base policy and the student to where fresh samples say that the budget is spent."""
        data, trainer = self._rollout_data, self.trainer
        if not self.calibrates or data is None or not data.prompt_plan.calibration:
            return
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        weights = WeightInterpolation(self.reference("base").parameters(), self.policy.parameters())
        attempts = count()

        def measure(alpha: float) -> Measurement:
            weights.move_to(alpha)
            return self._measure_spent(f"landing {next(attempts)}")

        if not all(map(is_finite, self.policy.parameters())):
            raise TrainingDiverged(f"optimiser step {self.global_step}: a weight of the policy is not a number")
        with eval_mode(trainer, self):
            fit = self.budget.fit_alpha(measure)
            weights.move_to(fit.alpha)
            self.budget.measured = self._measure_spent("the end")
        assert self.budget.effective_budget is not None
        if text := spending_warning(self.budget.measured, self.budget.effective_budget):
            self.reasons.append(f"the student ends {text}")
            rank_zero_warn(self.reasons[-1])

    def _measure_spent(self, purpose: str) -> Measurement:
        """What is spent of the tighter budget on fresh samples of the calibration prompts, in nats per token."""
        assert self._rollout_data is not None
        metrics: Any = self.metrics["calibration"]
        for batch in self._rollout_data.calibration_batches(purpose):
            self.evaluate(batch, metrics)
        ratios = {name: metric.compute() for name, metric in metrics.items() if name in KLS}
        spent = {name: Measurement(float(ratio.value), float(ratio.stderr)) for name, ratio in ratios.items()}
        for metric in metrics.values():
            metric.reset()
        return self.budget.tighter(spent[KLS[0]], spent[KLS[1]] if self.budget.total_budget is not None else None)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the budget controller found so far."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["budget"] = self.budget.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with it."""
        super().on_load_checkpoint(checkpoint)
        if "budget" not in checkpoint:
            raise UserError("the checkpoint is not one of a distillation: it holds no KL budget")
        self.budget.load_state_dict(checkpoint["budget"])

    # The loss.

    def select(self, rewards: Tensor, advantages: Tensor) -> Tensor:
        """See `TrainingModule.select`: every stored response holds states to learn in."""
        return torch.ones_like(rewards, dtype=torch.bool)

    def batch_loss(self, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `TrainingModule.batch_loss`: between student and tilted policy, or of the sampled tokens."""
        assert self.budget.beta is not None
        if self.iterations > 1:
            batch = self._scored_batch(batch)
        hidden = self.policy.hidden(batch)
        if self.objective.needs == "tokens":
            return self._token_loss(self.objective, batch, hidden)
        assert batch.scores is not None
        student, prior = self._student_logps(batch, hidden), self._prior(batch.scores)
        kl = exact_kl(student.detach(), batch.scores["base"])
        return self.objective(student, prior, self.signal(batch.scores), self.budget.beta), {"kl": kl}

    def _token_loss(
        self, objective: TokenObjective, batch: RolloutBatch, hidden: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of the sampled tokens."""
        assert batch.token_scores is not None
        assert self.budget.beta is not None
        logps, old_logps = self.policy.token_logps(batch, hidden).logps, self._old_logps.logps(batch)
        signal = self.signal(batch.token_scores)
        kl = self._kl(batch, hidden) if objective.kl_term else torch.zeros_like(logps)
        losses = objective(logps, old_logps, batch.sampler_logps, signal, kl, self.budget.beta)
        values = {"signal": signal, "log_ratio": logps - old_logps}
        return losses, {**values, "kl": kl} if objective.kl_term else values

    def _kl(self, batch: RolloutBatch, hidden: Tensor) -> Tensor:
        """KL of the student to the base policy, `(B, T)` in nats; with a total budget the mean by the two prices.

        Over support and tail where they are stored, over the vocabulary where the base policy is at hand.
        """
        if batch.scores is not None:
            return exact_kl(self._student_logps(batch, hidden), self._prior(batch.scores))
        kl = self.policy.divergence(self.reference("base"), batch, hidden).kl
        if self.budget.base_weight == 1:
            return kl
        first = self.policy.divergence(self.reference("first"), batch, hidden).kl
        return torch.lerp(first, kl, self.budget.base_weight)

    def _student_logps(self, batch: RolloutBatch, hidden: Tensor) -> Tensor:
        """Over support and tail, `(B, T, K+1)` in nats."""
        assert batch.support_ids is not None
        return self.policy.support_logps(batch, batch.support_ids, hidden)

    @torch.no_grad()
    def _scored_batch(self, batch: RolloutBatch) -> RolloutBatch:
        """A batch that the student answered, with what its objective takes of the frozen policies' log-probs."""
        names = self.signal.policies if self.refreshes_old_logps else sorted(self._scored)
        hidden = {name: self.reference(name).hidden(batch) for name in names}
        if self.refreshes_old_logps:
            logps = {name: self.reference(name).token_logps(batch, hidden[name]).logps for name in names}
            return replaced(batch, token_scores=logps)
        ids = self.reference("base").select_support(batch, SUPPORT_MASS, SUPPORT_SIZE, hidden["base"])
        scores = {name: self.reference(name).support_logps(batch, ids, hidden[name]) for name in names}
        return replaced(batch, scores=scores, support_ids=ids)

    def _prior(self, scores: dict[str, Tensor]) -> Tensor:
        """What the signal tilts: the base policy, or what lies between it and the first one."""
        if self.budget.base_weight == 1:
            return scores["base"]
        return geometric_mixture(scores["base"], scores["first"], self.budget.base_weight)
