"""A cheap estimate of the KL to a reference from training batches, which says when to measure."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ..objectives.divergences import kl_value

MIN_STEPS_BETWEEN = 10
"""Optimiser steps between a measurement and one that the estimate asks for."""

FALSE_ALARM_FACTOR = 1.25
"""How far the estimate has to rise above one that was a false alarm, to ask again."""


class KLEstimate:
    """Estimate of the KL to the reference from the micro-batches of an optimiser step, over all ranks, in nats.

    From `kl` `(B, T)` of `training_step`, or from `log_ratio` `(B, T)` of tokens that the reference sampled: k3 with
    the importance weight of the token, hence corrected for the token but not for the state that it was sampled in.

    Args:
        budget: The KL above which it asks for a measurement, in nats.
        per: Whether that is per response `token` or per `response`.
    """

    def __init__(self, budget: float, per: Literal["token", "response"]) -> None:
        self.budget = budget
        self.per = per
        self._alarm_threshold = budget
        self._sums = torch.zeros(2, dtype=torch.float64)  # of the estimates, and what it is to be divided by

    def add(self, trainer: Trainer, module: LightningModule, outputs: Mapping[str, Any]) -> None:
        """Add a micro-batch: what `training_step` returned."""
        self._sums = self._sums.to(module.device) + self._estimated(trainer, module, outputs)

    def finish_step(self, trainer: Trainer, module: LightningModule) -> float:
        """The estimate of the step, which is logged; NaN where there is none."""
        total = trainer.strategy.reduce(self._sums.to(module.device), reduce_op="sum")
        self._sums = torch.zeros_like(self._sums)
        if not total[1] > 0:
            return math.nan
        estimate = float(total[0] / total[1])
        module.log("kl_budget/estimate", estimate)
        return estimate

    def alarms(self, estimate: float, steps_since: int) -> bool:
        """Whether the estimate asks for a measurement, `steps_since` optimiser steps after the last one."""
        return estimate > self._alarm_threshold and steps_since >= MIN_STEPS_BETWEEN

    def raise_alarm(self, estimate: float) -> None:
        """After a measurement that it asked for: ask again only once the estimate is well above this one."""
        self._alarm_threshold = max(self.budget, estimate * FALSE_ALARM_FACTOR)

    def state_dict(self) -> dict[str, Any]:
        """Above which estimate it asks."""
        return {"alarm_threshold": self._alarm_threshold}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with it."""
        self._alarm_threshold = state["alarm_threshold"]

    def _estimated(self, trainer: Trainer, module: LightningModule, outputs: Mapping[str, Any]) -> Tensor:
        """Sum of the estimates of a micro-batch, and what it is to be divided by: `(2,)` float64."""
        mask, kl, log_ratio = (outputs.get(name) for name in ("mask", "kl", "log_ratio"))
        # Where old log-probs are taken again and again, or rollouts are those of earlier rounds too, the ratio does not
        # refer to the reference.
        train_data = getattr(getattr(trainer, "datamodule", None), "train_data", None)
        replays = train_data is not None and len(train_data.train_stores) > 1
        other = getattr(module, "refreshes_old_logps", False) or replays
        if kl is None and log_ratio is not None and not other:
            origin = torch.zeros_like(log_ratio)
            kl = kl_value(log_ratio, origin, "k3", sampler_logps=origin)
        if mask is None or kl is None:
            return torch.zeros_like(self._sums)
        number = mask.sum() if self.per == "token" else mask.any(-1).sum()
        return torch.stack([torch.where(mask, kl, 0.0).double().sum(), number.double()])
