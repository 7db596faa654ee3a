"""Stage 1: optimise long and weakly constrained on one fixed set of rollouts."""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from ..data.batching import RolloutBatch
from ..data.rollouts import RolloutDataModule
from ..errors import InvalidArgument
from ..objectives.divergences import Direction, check_kl_loss, kl_loss, kl_value
from ..objectives.extreme import SAPO, ExtremeObjective, flip_outcomes
from ..objectives.importance import importance_weights
from .training import TrainingModule


class ExtremeRegionModule(TrainingModule):
    """Drives a policy into the extreme region; the result, the teacher, is used only for its opinion.

    Args:
        policy: Folder or hub name of the causal language model to start from.
        objective: What is minimised on the stored rollouts.
        sign: 1 for a teacher; -1 for the unlearned policy, for which what was correct counts as incorrect.
        kl_coef: Weight of a KL to the base policy on the stored states in the loss, in nats per token; 0 for no
            constraint.
        kl_direction: `reverse` for `KL(policy || base)`, which keeps the policy from what the base policy would not
            say, or `forward` for `KL(base || policy)`, which keeps it able to say what that would.
        kl_estimator: `exact` over the vocabulary, which takes the base policy into memory, or from the stored tokens
            and the sampler's log-probs alone, which vary more: `k2` for `reverse`, `k1` or `k3` for `forward`. What
            they constrain to is the sampler as it sampled, temperature and all.
        keep: What training ends with: the `last` weights, or the `best` of those that were validated, by pass@1 on
            the training prompts outside the round (with `sign` -1 the lowest), so that what is measured on the
            held-out prompts is not what was chosen by; `RolloutDataModule.calibration_prompts` says how many of them.
        stop_at_kl: Stop after the first validation with at least this KL to the base policy, in nats per token; None
            for the trainer's own end.
        old_policy: pi_old, which the objective's importance ratio divides by: `base`, the policy that sampled the
            rollouts, or `iteration`, this policy as it was when the iteration began: the epoch on fixed rollouts, and
            the part of the prompts with `RolloutDataModule.iterations`.
        importance_cap: Bound on truncated importance weights `trainer / sampler`, which correct the loss of each token
            (of each response where the objective is one of responses) for what another engine's log-probs differ from
            the trainer's by; None for none. They are 1 where the trainer did not compute the log-probs of the rollouts
            once more (`RolloutDataModule.rescore`).
        **kwargs: Further arguments of `TrainingModule`.

    Raises:
        InvalidArgument: For a sign or a coefficient out of range, or an estimator whose gradient is not that of the KL.
    """

    def __init__(
        self,
        policy: str | Path,
        objective: ExtremeObjective | None = None,
        sign: int = 1,
        kl_coef: float = 0.0,
        kl_direction: Direction = "reverse",
        kl_estimator: Literal["exact", "k1", "k2", "k3"] = "exact",
        keep: Literal["last", "best"] = "last",
        stop_at_kl: float | None = None,
        old_policy: Literal["base", "iteration"] = "base",
        importance_cap: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, **kwargs)
        if sign not in (1, -1):
            raise InvalidArgument("sign", f"is {sign}: it must be 1 or -1")
        if not 0 <= kl_coef < float("inf"):
            raise InvalidArgument("kl_coef", f"is {kl_coef}: it must be at least 0")
        if old_policy not in ("base", "iteration"):
            raise InvalidArgument("old_policy", f"is {old_policy!r}: it must be base or iteration")
        try:
            check_kl_loss(kl_direction, kl_estimator)
        except ValueError as error:
            raise InvalidArgument("kl_estimator", f"is {kl_estimator!r}: {error}") from error
        if kl_coef > 0 and kl_estimator == "exact" and "base" not in self.references:
            raise InvalidArgument("kl_coef", "needs the reference `base` to measure the KL to")
        if keep not in ("last", "best"):
            raise InvalidArgument("keep", f"is {keep!r}: it must be last or best")
        if stop_at_kl is not None and not 0 < stop_at_kl < float("inf"):
            raise InvalidArgument("stop_at_kl", f"is {stop_at_kl}: it must be a positive, finite number")
        if stop_at_kl is not None and "base" not in self.references:
            raise InvalidArgument("stop_at_kl", "needs the reference `base` to measure the KL to")
        if importance_cap is not None and not 0 < importance_cap < float("inf"):
            raise InvalidArgument("importance_cap", f"is {importance_cap}: it must be a positive, finite ratio")
        self.objective = objective or SAPO()
        self.sign = sign
        self.kl_coef = kl_coef
        self.kl_direction = kl_direction
        self.kl_estimator = kl_estimator
        self.keep = keep
        self.calibrates = keep == "best"
        self.stop_at_kl = stop_at_kl
        self.old_policy = old_policy
        self.importance_cap = importance_cap
        self._best: float | None = None
        self._best_weights: dict[str, Tensor] = {}
        self._kl_reached = False

    @property
    def refreshes_old_logps(self) -> bool:  # type: ignore[override]
        """Whether the old log-probs are taken again in every iteration."""
        return self.old_policy == "iteration"

    @property
    def needs_groups(self) -> bool:  # type: ignore[override]
        """Whether the objective compares the responses of a group."""
        return self.objective.needs_groups

    def select(self, rewards: Tensor, advantages: Tensor) -> Tensor:
        """See `TrainingModule.select`: the objective's choice."""
        return self.objective.select(*self._outcomes(rewards, advantages))

    def batch_loss(self, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `TrainingModule.batch_loss`: the objective's loss and the weighted KL to the base policy."""
        hidden = self.policy.hidden(batch)
        stats = self.policy.token_logps(batch, hidden)
        outcomes = self._outcomes(batch.rewards, batch.advantages)
        old_logps = self._old_logps.logps(batch) if self.refreshes_old_logps else batch.trainer_logps
        losses = self.objective(stats.logps, old_logps, batch.mask, *outcomes)
        self._check_shape(losses, batch.mask)
        values = {
            "entropy": stats.entropy,
            "logp": stats.logps,
            "log_ratio": stats.logps - old_logps,
        }
        if self.importance_cap is not None:
            weights = self._importance_weights(batch, self.importance_cap)
            losses = weights * losses
            values["importance_weight"] = weights if losses.dim() == 2 else weights[:, None].expand_as(batch.mask)
        if self.kl_coef > 0:
            kl, values["kl"] = self._kl(batch, hidden, stats.logps)
            losses = losses + self.kl_coef * self._kl_loss(kl, batch)
        return losses, values

    def setup(self, stage: str) -> None:
        """Refuse rollouts that the loss would take for what they are not."""
        super().setup(stage)
        if getattr(self.objective, "correct_threshold", 1.0) != self.correct_threshold:
            self.objective.correct_threshold = self.correct_threshold
        if stage == "fit" and self._rollout_data is not None:
            self.check_rollouts(self._rollout_data)
            plan = self._rollout_data.prompt_plan
            self._check_validates(bool(plan.held_out))
            if self.keep == "best" and plan.held_out and not plan.calibration:
                raise InvalidArgument(
                    "keep",
                    "is best, but no training prompts are left outside the round to choose on: it takes "
                    "prompts_per_round below their number and calibration_prompts of at least 1",
                )

    def _check_validates(self, held_out: bool) -> None:
        """Refuse weights that are chosen by what is measured, where nothing is: training would go on to its end."""
        trainer: Any = self.trainer
        epochs, every = trainer.max_epochs, trainer.check_val_every_n_epoch
        never = every is not None and epochs is not None and 0 < epochs < every
        if held_out and trainer.limit_val_batches != 0 and not never:
            return
        for name, value in {"keep": self.keep == "best" and "best", "stop_at_kl": self.stop_at_kl}.items():
            if value:
                raise InvalidArgument(
                    name,
                    f"is {value}, but nothing would be validated: it takes validation prompts, limit_val_batches above "
                    "0 and check_val_every_n_epoch of at most max_epochs",
                )

    def check_rollouts(self, data: RolloutDataModule) -> None:
        """Whether the rollouts are those that the KL term takes them for.

        Raises:
            InvalidArgument: If they are another policy's, and the KL to the base policy is estimated from them.
        """
        if self.kl_coef == 0 or self.kl_estimator == "exact":
            return
        others = {
            "with iterations above 1 they are the policy's own": data.iterations > 1,
            "with replay some are those of the base policies of earlier rounds": data.replay > 0,
        }
        for reason in (reason for reason, holds in others.items() if holds):
            raise InvalidArgument(
                "kl_estimator",
                f"is {self.kl_estimator}, which takes rollouts for those of the base policy; {reason}: take exact",
            )

    def on_train_start(self) -> None:
        """Stop at once where an interrupted run had come to its end."""
        if self._kl_reached:
            self.trainer.should_stop = True
        super().on_train_start()

    def on_validation_epoch_end(self) -> None:
        """Log and reset, also what was measured on the prompts that the best weights are chosen by."""
        super().on_validation_epoch_end()
        metrics: Any = self.metrics["calibration"]
        if len(metrics):
            self._log_metrics("calibration")

    def on_validation_end(self) -> None:
        """Keep the weights that are the best so far, and the base policy where the loss needs it."""
        if self.kl_coef == 0 or self.kl_estimator != "exact":
            self.release_references()
        found = self.trainer.callback_metrics
        training = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        if not training or "val/pass@1" not in found:
            return
        if self.keep == "best":
            score = self.sign * float(found["calibration/pass@1"])
            if self._best is None or score > self._best:
                self._best = score
                self._best_weights = {name: value.cpu().clone() for name, value in self.policy.state_dict().items()}
        if self.stop_at_kl is not None and float(found["val/kl_per_token"]) >= self.stop_at_kl:
            self._kl_reached = True
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the best weights so far, and whether the KL is past its threshold."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["teacher"] = {
            "best": self._best,
            "best_weights": self._best_weights,
            "kl_reached": self._kl_reached,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with them."""
        super().on_load_checkpoint(checkpoint)
        teacher = checkpoint.get("teacher")
        if teacher is not None:
            self._best, self._best_weights = teacher["best"], teacher["best_weights"]
            self._kl_reached = teacher["kl_reached"]

    def finalize_weights(self) -> None:
        """Take the best weights, where these are asked for.

        Raises:
            InvalidArgument: If none were validated.
        """
        if self.keep == "best" and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            if self._best is None:
                raise InvalidArgument("keep", "is best, but nothing was validated: it takes validation prompts")
            self.policy.load_state_dict(self._best_weights)

    def _kl(self, batch: RolloutBatch, hidden: Tensor, logps: Tensor) -> tuple[Tensor, Tensor]:
        """The KL to the base policy as a loss, and as a value to log: `(B, T)` each, in nats."""
        direction, base = self.kl_direction, batch.trainer_logps
        if self.kl_estimator == "exact":
            kl = self.policy.divergence(self.reference("base"), batch, hidden, direction).kl
            return kl, kl
        loss = kl_loss(logps, base, direction=direction, estimator=self.kl_estimator, sampler_logps=base)
        # Of the values, k3 is the one whose mean is exact and that is never negative.
        pair = (logps, base) if direction == "reverse" else (base, logps)
        return loss, kl_value(*pair, "k3", sampler_logps=base)

    def _kl_loss(self, kl: Tensor, batch: RolloutBatch) -> Tensor:
        """The KL `(B, T)` per token or per response, as the objective is: in the loss it is a mean over tokens."""
        if self.objective.per == "token":
            return kl
        return torch.where(batch.mask, kl, 0.0).sum(-1) * (batch.step_responses / batch.step_tokens)

    def _importance_weights(self, batch: RolloutBatch, cap: float) -> Tensor:
        """Of the tokens `(B, T)` or of the responses `(B,)`, as the objective is."""
        pair = batch.trainer_logps, batch.sampler_logps  # 0 in padding
        if self.objective.per != "token":
            pair = pair[0].sum(-1), pair[1].sum(-1)
        return importance_weights(*pair, truncate=cap)

    def _check_shape(self, losses: Tensor, mask: Tensor) -> None:
        per = self.objective.per
        expected = mask.shape if per == "token" else mask.shape[:1]
        if losses.shape != expected:
            raise InvalidArgument(
                "objective",
                f"is {type(self.objective).__name__}, which gave a loss of shape {tuple(losses.shape)}; "
                f"with per = {per!r} it must be {tuple(expected)}",
            )

    def _outcomes(self, rewards: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        if self.sign == 1:
            return rewards, advantages
        return flip_outcomes(rewards, advantages, self.correct_threshold)
