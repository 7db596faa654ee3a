"""A KL budget as a contract: weights that overran it do not leave a training unnoticed, and can be brought back."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from itertools import count
from pathlib import Path
from statistics import NormalDist
from time import perf_counter
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from ..budget.controller import MAX_RELATIVE_ERROR, BudgetController
from ..budget.interpolation import WeightInterpolation
from ..budget.search import Measurement
from ..data.samplers import Sampler
from ..data.sources import PromptSource
from ..errors import InvalidArgument, UserError, check_at_least
from ..models.checks import is_finite
from ..modules.training import TrainingModule
from .fresh_kl import FreshKL, policy_of
from .kl_estimate import KLEstimate

Action = Literal["warn", "stop", "rollback", "search", "adapt"]

DIVERGED = "optimiser step {step}: {what}; training has diverged. The last checkpoint is untouched"


class BudgetExceeded(UserError):
    """Training ended outside the KL budget."""


class KLBudget(Callback):
    """Measures the KL to a reference policy on fresh samples, exactly over the vocabulary, and acts on an overrun.

    A policy is inside the budget where the upper confidence bound of its KL is. It is measured in every validation
    that logs it, as a `PolicyModule`'s does at no further cost, or every `every_n_steps`. Between measurements a cheap
    estimate from the training batches is logged as `kl_budget/estimate`; where that crosses the budget, a measurement
    follows at once. At the end of training the last word is on the weights that are left: they are inside, or
    are brought inside, or the training fails with `BudgetExceeded`.

    It works with any `LightningModule` that has a `policy`, a causal language model of `transformers` or a `Policy`.
    For the estimate, `training_step` returns a dictionary with the `mask` `(B, T)` of the response tokens and `kl`
    `(B, T)`, the KL to the reference at each of them, or `log_ratio` `(B, T)`, the log-prob of each token minus
    the reference's, all in nats and of tokens that the reference sampled: k3 with the importance weight of the token,
    hence corrected for the token but not for the state that it was sampled in.

    Args:
        budget: The most KL, in nats.
        action: What follows an overrun. `warn` says so; `stop` ends training; `rollback` ends it with the last
            weights that were inside; `search` goes back from the weights outside towards those, until what is measured
            is inside and within `tolerance` of the budget, and ends it there; `adapt` changes a coefficient of the
            module after each measurement instead, by `1 + gain * clip(KL / budget - 1, -0.2, 0.2)` (Ziegler et al.
            2019, arXiv 1909.08593).
        per: Whether the budget is per response `token` or per `response`.
        reference: The policy that the KL is measured to: a name among the module's `references`, or a folder or hub
            name.
        every_n_steps: Optimiser steps between measurements; None for validations alone.
        confidence: One-sided confidence of the upper bound.
        patience: Measurements outside in a row that are let pass. The last one, at the end of training, is not.
        tolerance: For `search`, the most of the budget that is to be left, as a share of it.
        prompts: File or data set of the prompts to measure on, or a `PromptSource`; None for the training prompts of
            the trainer's `RolloutDataModule` that its round does not use, or else its held-out ones.
        tokenizer: Where the tokenizer for them is; None for beside the reference.
        sampler: Draws responses to them; None for that of the `RolloutDataModule`, or the default.
        max_prompts: Prompts of a measurement. A search takes up to 16 times as many where it needs them and there are
            as many; with few prompts the budget is surely kept, but not nearly spent.
        samples: Responses to each.
        coefficient: For `adapt`, the module's attribute: the weight of its KL term.
        gain: For `adapt`, how much of the relative error is put on the coefficient at once.
        seed: Seed of the draws.

    Attributes:
        reasons: What was found and done, one line each, with the optimiser step.

    Raises:
        InvalidArgument: For a value out of range.
    """

    def __init__(
        self,
        budget: float,
        action: Action = "search",
        per: Literal["token", "response"] = "token",
        reference: str = "base",
        every_n_steps: int | None = None,
        confidence: float = 0.95,
        patience: int = 0,
        tolerance: float = 0.05,
        prompts: PromptSource | str | Path | None = None,
        tokenizer: str | Path | None = None,
        sampler: Sampler | None = None,
        max_prompts: int = 512,
        samples: int = 2,
        coefficient: str = "kl_coef",
        gain: float = 1.0,
        seed: int = 0,
    ) -> None:
        if not 0 < budget < math.inf:
            raise InvalidArgument("budget", f"is {budget}: it must be a positive, finite number of nats")
        if action not in get_args(Action):
            raise InvalidArgument("action", f"is {action!r}: it must be one of {', '.join(get_args(Action))}")
        if per not in ("token", "response"):
            raise InvalidArgument("per", f"is {per!r}: it must be token or response")
        if not 0.5 < confidence < 1:
            raise InvalidArgument("confidence", f"is {confidence}: it must lie between 0.5 and 1")
        if not 0 < tolerance < 1:
            raise InvalidArgument("tolerance", f"is {tolerance}: it must lie between 0 and 1")
        check_at_least(1, max_prompts=max_prompts, samples=samples, every_n_steps=every_n_steps)
        check_at_least(0, patience=patience)
        if not 0 < gain < 1 / MAX_RELATIVE_ERROR:
            raise InvalidArgument("gain", f"is {gain}: it must be above 0 and below {1 / MAX_RELATIVE_ERROR:g}")
        self.controller = BudgetController(budget, margin=NormalDist().inv_cdf(confidence), tolerance=tolerance)
        self.budget = budget
        self.action = action
        self.fresh_kl = FreshKL(reference, per, prompts, tokenizer, sampler, max_prompts, samples, seed)
        self.every_n_steps = every_n_steps
        self.patience = patience
        self.coefficient = coefficient
        self.gain = gain
        self.reasons: list[str] = []
        self.last: Measurement | None = None
        self.seconds = 0.0
        self._last_step = 0
        self._versions: list[int] = []
        self._violations = 0
        self._estimate = KLEstimate(budget, per)
        self._outside = self._acted = self._ended = False
        self._inside_weights: dict[str, Tensor] = {}
        self._inside: Measurement | None = None
        self._value: float | None = None
        self._step = 0

    @property
    def upper(self) -> float:
        """Upper confidence bound of the KL that was measured last, in nats; NaN before the first measurement."""
        return math.nan if self.last is None else self.controller.upper(self.last)

    # When to look.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what could not be measured or adapted later."""
        if stage != "fit":
            return
        self._ended = False
        try:
            self.fresh_kl.check(trainer, pl_module)
        except InvalidArgument as error:
            raise error.under("KLBudget") from error
        if self.action == "adapt" and not _positive(getattr(pl_module, self.coefficient, None)):
            raise InvalidArgument(
                "KLBudget.coefficient",
                f"is {self.coefficient!r}: {type(pl_module).__name__} has no positive {self.coefficient} to adapt",
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights to go back to, and go on as an interrupted training was."""
        self._step = trainer.global_step
        if self._value is not None:
            setattr(pl_module, self.coefficient, self._value)
        if self._acted:
            trainer.should_stop = True
        elif not self._inside_weights and self.action in ("rollback", "search"):
            self._inside_weights = _weights(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Estimate from the batch, and measure where that is due or the estimate asks for it."""
        if isinstance(outputs, Mapping):
            self._estimate.add(trainer, pl_module, outputs)
        if trainer.global_step == self._step or trainer.fast_dev_run or self._acted:  # type: ignore[attr-defined]
            return
        self._step = trainer.global_step
        began = perf_counter()
        estimate = self._estimate.finish_step(trainer, pl_module)
        self.seconds += perf_counter() - began  # A measurement counts its own.
        alarmed = self._estimate.alarms(estimate, self._step - self._last_step)
        if alarmed or (self.every_n_steps is not None and self._step % self.every_n_steps == 0):
            self._judge(trainer, pl_module, self._measure(trainer, pl_module, f"step {self._step}"))
            if alarmed:
                self._estimate.raise_alarm(estimate)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take what validation measured."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or self._acted:
            return
        found = self._validated(trainer, pl_module)
        if found is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._judge(trainer, pl_module, found)

    # What to do.

    def _judge(self, trainer: Trainer, module: LightningModule, found: Measurement) -> None:
        """Note a measurement, the same on all ranks, and act on it."""
        outside = self._take(trainer, module, found)
        if self.action == "adapt":
            self._adapt(module, found)
        if not outside:
            self._violations = 0
            self._keep(module, found)
            return
        self._violations += 1
        if self._violations <= self.patience:
            return
        if self.action == "warn" and self._violations > self.patience + 1:
            return  # Once for each crossing.
        self._report(trainer, f"{self._described(found)} is outside: {self._action_text}")
        if self.action in ("stop", "rollback", "search"):
            self._bring_back(trainer, module, found)
            self._acted = trainer.should_stop = True

    def _bring_back(self, trainer: Trainer, module: LightningModule, outside: Measurement) -> None:
        """Where the action says so, weights inside the budget instead of those outside."""
        if self.action == "rollback":
            _restore(module, self._inside_weights)
            if self._inside is not None:
                self._take(trainer, module, self._inside)
        elif self.action == "search":
            self._search(trainer, module, outside)

    def _search(self, trainer: Trainer, module: LightningModule, outside: Measurement) -> None:
        inside = [weight.to(module.device) for weight in self._inside_weights.values()]  # in the parameters' order
        weights, attempts = WeightInterpolation(inside, _parameters(module)), count()

        def measure(alpha: float) -> Measurement:
            weights.move_to(alpha)
            purpose = f"search {trainer.global_step} {next(attempts)}"
            return self._measure(trainer, module, purpose, stderr=self.controller.search_stderr)

        if self._inside is None:  # The weights that training began with.
            self._inside = measure(0.0)
        fit = self.controller.fit_alpha(measure, inside=self._inside.kl, outside=outside.kl)
        weights.move_to(fit.alpha)
        if fit.measured is None:
            self._take(trainer, module, self._inside)
            self._report(trainer, "nothing between them was inside: the last weights inside are back")
            return
        self._take(trainer, module, fit.measured)
        text = f"{self._described(fit.measured)} after going back to alpha {fit.alpha:.2f}: inside"
        self._report(trainer, text)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last word, with the policy still on its device."""
        self._end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last word where Lightning found nothing left to train, after a kill."""
        if not self._ended:
            pl_module.to(trainer.strategy.root_device)
            self._end(trainer, pl_module)
        self.fresh_kl.clear_cache()

    def _end(self, trainer: Trainer, module: LightningModule) -> None:
        """The weights that are left are inside, or are brought inside, or the training fails.

        Raises:
            BudgetExceeded: If they are not.
        """
        self._ended = True
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not self._versions and self._last_step == trainer.global_step:
            self._versions = _versions(module)  # A checkpoint's weights are those that its measurement is of.
        if isinstance(module, TrainingModule):
            module.ensure_finalized()
        if self.last is None or self._versions != _versions(module):
            outside = self._take(trainer, module, self._measure(trainer, module, "end"))
            assert self.last is not None
            if outside and self.action in ("rollback", "search"):
                self._report(trainer, f"{self._described(self.last)} is outside at the end: {self._action_text}")
                self._bring_back(trainer, module, self.last)
                if self._versions != _versions(module):
                    self._take(trainer, module, self._measure(trainer, module, "brought back"))
        assert self.last is not None
        if self._outside:
            raise BudgetExceeded(
                f"KLBudget: training ended outside its budget: {self._described(self.last)}. The last checkpoint is "
                "untouched; action search or rollback brings the weights inside"
            )
        trainer.print(f"KLBudget: {self._described(self.last)} at the end, inside")

    def _adapt(self, module: LightningModule, found: Measurement) -> None:
        self._value = self.controller.adapted(getattr(module, self.coefficient), found, self.gain)
        setattr(module, self.coefficient, self._value)

    def _keep(self, module: LightningModule, found: Measurement) -> None:
        if self.action in ("rollback", "search"):
            self._inside_weights, self._inside = _weights(module), found

    def _take(self, trainer: Trainer, module: LightningModule, found: Measurement) -> bool:
        """Note and log a measurement; whether it is outside the budget, which all ranks agree on.

        Raises:
            UserError: If it is not a number.
        """
        if not math.isfinite(found.kl):
            what = f"the KL to {self.fresh_kl.reference} is {found.kl}"
            raise UserError(DIVERGED.format(step=trainer.global_step, what=what))
        self.last, self._last_step, self._versions = found, trainer.global_step, _versions(module)
        logged = {
            "kl_budget/kl": found.kl,
            "kl_budget/stderr": found.stderr,
            "kl_budget/upper": self.controller.upper(found),
            "kl_budget/seconds": self.seconds,
        }
        if self._value is not None:
            logged["kl_budget/coefficient"] = self._value
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=max(trainer.global_step - 1, 0))  # Where Lightning counts the rest.
        outside = not self.controller.is_inside(found)
        self._outside = trainer.strategy.reduce_boolean_decision(outside, all=False)
        return self._outside

    # How to measure.

    def _validated(self, trainer: Trainer, module: LightningModule) -> Measurement | None:
        """What validation logged of this very KL; a measurement of its own where steps do not say when."""
        found = self.fresh_kl.logged(trainer, module)
        if found is None and self.every_n_steps is None:
            return self._measure(trainer, module, f"validation {trainer.global_step}")
        return found

    def _measure(
        self, trainer: Trainer, module: LightningModule, purpose: str, stderr: float = math.inf
    ) -> Measurement:
        """The KL on fresh samples, and the time that it took; see `FreshKL.measure`.

        Raises:
            UserError: If a weight of the policy is not a number.
        """
        began = perf_counter()
        if not all(map(is_finite, _parameters(module))):
            raise UserError(DIVERGED.format(step=trainer.global_step, what="a weight of the policy is not a number"))
        found = self.fresh_kl.measure(trainer, module, purpose, stderr)
        self.seconds += perf_counter() - began
        return found

    # What to say.

    def _described(self, found: Measurement) -> str:
        return (
            f"KL {found.kl:.4g} ± {found.stderr:.2g} nats per {self.fresh_kl.per} to {self.fresh_kl.reference} "
            f"(at most {self.controller.upper(found):.4g}, budget {self.budget:.4g})"
        )

    @property
    def _action_text(self) -> str:
        return {
            "warn": "training goes on",
            "stop": "training stops",
            "rollback": "back to the last weights inside",
            "search": "going back towards the last weights inside",
            "adapt": f"{self.coefficient} is now {self._value}",
        }[self.action]

    def _report(self, trainer: Trainer, text: str) -> None:
        self.reasons.append(f"step {trainer.global_step}: {text}")
        trainer.print(f"KLBudget, step {trainer.global_step}: {text}")

    # Going on.

    def state_dict(self) -> dict[str, Any]:
        return {
            "controller": self.controller.state_dict(),
            "estimate": self._estimate.state_dict(),
            "reasons": list(self.reasons),
            "last": None if self.last is None else astuple(self.last),
            "last_step": self._last_step,
            "violations": self._violations,
            "outside": self._outside,
            "acted": self._acted,
            "inside_weights": self._inside_weights,
            "inside": None if self._inside is None else astuple(self._inside),
            "value": self._value,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.controller.load_state_dict(state_dict["controller"])
        self._estimate.load_state_dict(state_dict["estimate"])
        self.reasons = list(state_dict["reasons"])
        last, inside = state_dict["last"], state_dict["inside"]
        self.last = None if last is None else Measurement(*last)
        self._inside = None if inside is None else Measurement(*inside)
        self._last_step, self._violations = state_dict["last_step"], state_dict["violations"]
        self._outside, self._acted = state_dict["outside"], state_dict["acted"]
        self._inside_weights = state_dict["inside_weights"]
        self._value, self.seconds = state_dict["value"], state_dict["seconds"]
        self._versions = []


def _parameters(module: LightningModule) -> Sequence[nn.Parameter]:
    return list(policy_of(module).model.parameters())


def _versions(module: LightningModule) -> list[int]:
    """What changes whenever weights do."""
    return [parameter._version for parameter in _parameters(module)]


def _weights(module: LightningModule) -> dict[str, Tensor]:
    """A copy of the policy's weights."""
    return {name: value.detach().cpu().clone() for name, value in policy_of(module).model.named_parameters()}


@torch.no_grad()
def _restore(module: LightningModule, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in policy_of(module).model.named_parameters():
        parameter.copy_(weights[name])


def _positive(value: Any) -> bool:
    return isinstance(value, float | int) and 0 < value < math.inf
