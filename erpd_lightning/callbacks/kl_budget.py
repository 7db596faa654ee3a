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

from ..budget.interpolation import Line, Measured, go_back
from ..data.samplers import Sampler
from ..errors import InvalidArgument, UserError
from ..modules.policy_module import PolicyModule
from ..objectives.divergences import kl_value
from .fresh_kl import FreshKL, policy_of

Action = Literal["warn", "stop", "rollback", "search", "adapt"]

PAUSE = 10
"""Optimiser steps between a measurement and one that the cheap estimate asks for."""

DOUBT = 1.25
"""How far the estimate has to rise above one that was a false alarm, to ask again."""

DIVERGED = "optimiser step {step}: {what}; training has diverged. The last checkpoint is untouched"

WIDEST = 0.2
"""The largest relative error that a coefficient is adapted by."""


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
        prompts: JSONL file or data set of the prompts to measure on; None for the training prompts of the trainer's
            `RolloutDataModule` that its round does not use, or else its held-out ones.
        tokenizer: Where the tokenizer for them is; None for beside the reference.
        sampler: Draws responses to them; None for the default.
        max_prompts: Prompts of a measurement. A search takes up to 16 times as many where it needs them and there are
            as many; with few prompts the budget is surely kept, but not nearly spent.
        samples: Responses to each.
        coefficient: For `adapt`, the module's attribute: the weight of its KL term.
        gain: For `adapt`, how much of the relative error is put on the coefficient at once.
        seed: Seed of the draws.

    Attributes:
        reasons: What was found and done, one line each, with the optimiser step.

    Raises:
        UserError: For a value out of range.
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
        prompts: str | Path | None = None,
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
        counts = {"max_prompts": max_prompts, "samples": samples, "every_n_steps": every_n_steps}
        for name, number in counts.items():
            if number is not None and number < 1:
                raise InvalidArgument(name, f"is {number}: it must be at least 1")
        if patience < 0:
            raise InvalidArgument("patience", f"is {patience}: it must be at least 0")
        if not 0 < gain < 1 / WIDEST:
            raise InvalidArgument("gain", f"is {gain}: it must be above 0 and below {1 / WIDEST:g}")
        self.budget = budget
        self.action = action
        self.fresh_kl = FreshKL(reference, per, prompts, tokenizer, sampler, max_prompts, samples, seed)
        self.every_n_steps = every_n_steps
        self.margin = NormalDist().inv_cdf(confidence)
        self.patience = patience
        self.tolerance = tolerance
        self.coefficient = coefficient
        self.gain = gain
        self.reasons: list[str] = []
        self.last: Measured | None = None
        self.seconds = 0.0
        self._last_step = 0
        self._versions: list[int] = []
        self._strikes = 0
        self._alarm = budget
        self._outside = self._acted = self._ended = False
        self._inside: dict[str, Tensor] = {}
        self._inside_found: Measured | None = None
        self._value: float | None = None
        self._sums = torch.zeros(2, dtype=torch.float64)
        self._step = 0

    @property
    def upper(self) -> float:
        """Upper confidence bound of the KL that was measured last, in nats; NaN before the first measurement."""
        return math.nan if self.last is None else self._bound(self.last)

    # When to look.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what could not be measured or adapted later."""
        if stage != "fit":
            return
        self._ended = False
        self.fresh_kl.check(trainer, pl_module)
        if self.action == "adapt" and not _positive(getattr(pl_module, self.coefficient, None)):
            raise UserError(
                f"KLBudget.coefficient: {type(pl_module).__name__} has no positive {self.coefficient} to adapt"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights to go back to, and go on as an interrupted training was."""
        self._step = trainer.global_step
        if self._value is not None:
            setattr(pl_module, self.coefficient, self._value)
        if self._acted:
            trainer.should_stop = True
        elif not self._inside and self.action in ("rollback", "search"):
            self._inside = _weights(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Estimate from the batch, and measure where that is due or the estimate asks for it."""
        if isinstance(outputs, Mapping):
            self._sums = self._sums.to(pl_module.device) + self._estimated(trainer, pl_module, outputs)
        if trainer.global_step == self._step or trainer.fast_dev_run or self._acted:  # type: ignore[attr-defined]
            return
        self._step = trainer.global_step
        began = perf_counter()
        total = trainer.strategy.reduce(self._sums.to(pl_module.device), reduce_op="sum")
        self._sums = torch.zeros_like(self._sums)
        estimate = math.nan
        if total[1] > 0:
            estimate = float(total[0] / total[1])
            pl_module.log("kl_budget/estimate", estimate)
        self.seconds += perf_counter() - began  # A measurement counts its own.
        alarmed = estimate > self._alarm and self._step - self._last_step >= PAUSE
        if alarmed or (self.every_n_steps is not None and self._step % self.every_n_steps == 0):
            self._judge(trainer, pl_module, self._measure(trainer, pl_module, f"step {self._step}"))
            self._alarm = max(self.budget, estimate * DOUBT) if alarmed else self._alarm

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take what validation measured."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or self._acted:
            return
        found = self._validated(trainer, pl_module)
        if found is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._judge(trainer, pl_module, found)

    # What to do.

    def _judge(self, trainer: Trainer, module: LightningModule, found: Measured) -> None:
        """Note a measurement, the same on all ranks, and act on it."""
        outside = self._take(trainer, module, found)
        if self.action == "adapt":
            self._adapt(module, found)
        if not outside:
            self._strikes = 0
            self._keep(module, found)
            return
        self._strikes += 1
        if self._strikes <= self.patience:
            return
        if self.action == "warn" and self._strikes > self.patience + 1:
            return  # Once for each crossing.
        self._tell(trainer, f"{self._described(found)} is outside: {self._deed}")
        if self.action in ("stop", "rollback", "search"):
            self._bring_back(trainer, module, found)
            self._acted = trainer.should_stop = True

    def _bring_back(self, trainer: Trainer, module: LightningModule, outside: Measured) -> None:
        """Where the action says so, weights inside the budget instead of those outside."""
        if self.action == "rollback":
            _restore(module, self._inside)
            if self._inside_found is not None:
                self._take(trainer, module, self._inside_found)
        elif self.action == "search":
            self._search(trainer, module, outside)

    def _search(self, trainer: Trainer, module: LightningModule, outside: Measured) -> None:
        inside = [weight.to(module.device) for weight in self._inside.values()]  # in the order of the parameters
        line, attempts = Line(inside, _parameters(module)), count()

        def measure(share: float) -> Measured:
            line.move_to(share)
            purpose = f"search {trainer.global_step} {next(attempts)}"
            return self._measure(trainer, module, purpose, stderr=self.tolerance * self.budget / 2 / self.margin)

        if self._inside_found is None:  # The weights that training began with.
            self._inside_found = measure(0.0)
        share, found = go_back(
            measure,
            self.budget,
            inside=self._inside_found.kl,
            outside=outside.kl,
            margin=self.margin,
            tolerance=self.tolerance,
        )
        line.move_to(share)
        if found is None:
            self._take(trainer, module, self._inside_found)
            self._tell(trainer, "no place on the line was inside: the last weights inside are back")
            return
        self._take(trainer, module, found)
        self._tell(trainer, f"{self._described(found)} after going back to {share:.2f} of the way: inside")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last word, with the policy still on its device."""
        self._end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last word where Lightning found nothing left to train, after a kill."""
        if not self._ended:
            pl_module.to(trainer.strategy.root_device)
            self._end(trainer, pl_module)
        self.fresh_kl.forget()

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
        if isinstance(module, PolicyModule):
            module.finish()
        if self.last is None or self._versions != _versions(module):
            outside = self._take(trainer, module, self._measure(trainer, module, "end"))
            assert self.last is not None
            if outside and self.action in ("rollback", "search"):
                self._tell(trainer, f"{self._described(self.last)} is outside at the end: {self._deed}")
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

    def _adapt(self, module: LightningModule, found: Measured) -> None:
        error = min(max(found.kl / self.budget - 1, -WIDEST), WIDEST)
        self._value = getattr(module, self.coefficient) * (1 + self.gain * error)
        setattr(module, self.coefficient, self._value)

    def _keep(self, module: LightningModule, found: Measured) -> None:
        if self.action in ("rollback", "search"):
            self._inside, self._inside_found = _weights(module), found

    def _take(self, trainer: Trainer, module: LightningModule, found: Measured) -> bool:
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
            "kl_budget/upper": self._bound(found),
            "kl_budget/seconds": self.seconds,
        }
        if self._value is not None:
            logged["kl_budget/coefficient"] = self._value
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=max(trainer.global_step - 1, 0))  # Where Lightning counts the rest.
        outside = not self._bound(found) <= self.budget
        self._outside = trainer.strategy.reduce_boolean_decision(outside, all=False)
        return self._outside

    # How to measure.

    def _validated(self, trainer: Trainer, module: LightningModule) -> Measured | None:
        """What validation logged of this very KL; a measurement of its own where steps do not say when."""
        found = self.fresh_kl.logged(trainer, module)
        if found is None and self.every_n_steps is None:
            return self._measure(trainer, module, f"validation {trainer.global_step}")
        return found

    def _measure(self, trainer: Trainer, module: LightningModule, purpose: str, stderr: float = math.inf) -> Measured:
        """The KL on fresh samples, and the time that it took; see `FreshKL.measure`.

        Raises:
            UserError: If a weight of the policy is not a number.
        """
        began = perf_counter()
        if not all(parameter.isfinite().all() for parameter in _parameters(module)):
            raise UserError(DIVERGED.format(step=trainer.global_step, what="a weight of the policy is not a number"))
        found = self.fresh_kl.measure(trainer, module, purpose, stderr)
        self.seconds += perf_counter() - began
        return found

    def _estimated(self, trainer: Trainer, module: LightningModule, outputs: Mapping[str, Any]) -> Tensor:
        """Sum of the estimates of a micro-batch, and what it is to be divided by: `(2,)` float64."""
        mask, kl, log_ratio = (outputs.get(name) for name in ("mask", "kl", "log_ratio"))
        # Where the anchor of the ratio is taken again and again, or rollouts are those of earlier rounds too, it is
        # not the reference.
        data = getattr(trainer, "datamodule", None)
        other = getattr(module, "re_anchors", False) or len(getattr(data, "trained_on", ())) > 1
        if kl is None and log_ratio is not None and not other:
            origin = torch.zeros_like(log_ratio)
            kl = kl_value(log_ratio, origin, "k3", sampler_logps=origin)
        if mask is None or kl is None:
            return torch.zeros_like(self._sums)
        number = mask.sum() if self.fresh_kl.per == "token" else mask.any(-1).sum()
        return torch.stack([torch.where(mask, kl, 0.0).double().sum(), number.double()])

    # What to say.

    def _bound(self, found: Measured) -> float:
        return found.kl + self.margin * (found.stderr if math.isfinite(found.stderr) else math.inf)

    def _described(self, found: Measured) -> str:
        return (
            f"KL {found.kl:.4g} ± {found.stderr:.2g} nats per {self.fresh_kl.per} to {self.fresh_kl.reference} "
            f"(at most {self._bound(found):.4g}, budget {self.budget:.4g})"
        )

    @property
    def _deed(self) -> str:
        return {
            "warn": "training goes on",
            "stop": "training stops",
            "rollback": "back to the last weights inside",
            "search": "going back towards the last weights inside",
            "adapt": f"{self.coefficient} is now {self._value}",
        }[self.action]

    def _tell(self, trainer: Trainer, text: str) -> None:
        self.reasons.append(f"step {trainer.global_step}: {text}")
        trainer.print(f"KLBudget, step {trainer.global_step}: {text}")

    # Going on.

    def state_dict(self) -> dict[str, Any]:
        return {
            "reasons": list(self.reasons),
            "last": None if self.last is None else astuple(self.last),
            "last_step": self._last_step,
            "strikes": self._strikes,
            "alarm": self._alarm,
            "outside": self._outside,
            "acted": self._acted,
            "inside": self._inside,
            "inside_found": None if self._inside_found is None else astuple(self._inside_found),
            "value": self._value,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reasons = list(state_dict["reasons"])
        self.last = None if state_dict["last"] is None else Measured(*state_dict["last"])
        self._last_step, self._strikes = state_dict["last_step"], state_dict["strikes"]
        self._alarm, self._outside, self._acted = (state_dict[name] for name in ("alarm", "outside", "acted"))
        found = state_dict["inside_found"]
        self._inside, self._inside_found = state_dict["inside"], None if found is None else Measured(*found)
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
