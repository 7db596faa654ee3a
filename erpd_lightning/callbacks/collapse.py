"""Eyes on a stage: what shows that a policy gains, drifts and collapses, with limits that warn or stop."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from ..modules.policy_module import TrainingDiverged
from ..objectives.reduction import masked_sum
from ..text import aligned

OF_TOKENS = ("ess", "max_log_ratio", "tail_share", "clipped_share", "entropy", "logp_right", "logp_wrong")
"""What is computed from the tokens of optimiser steps, and logged as `collapse/NAME`."""

OF_VALIDATION = ("pass@1", "kl_per_token", "entropy_per_token", "mean_length", "truncated", "distinct")
"""What is read from validation, where the module logs it as `val/NAME`."""

COLUMNS = {
    "pass@1": ("val/pass@1",),
    "KL/token": ("val/kl_per_token",),
    "entropy": ("val/entropy_per_token", "collapse/entropy"),
    "logp right": ("collapse/logp_right",),
    "logp wrong": ("collapse/logp_wrong",),
    "ESS": ("collapse/ess",),
    "distinct": ("val/distinct",),
}
"""Columns of the table at the end, and which quantity is in them: the first that was ever measured."""

ADDED = (
    "ratio_tokens",
    "tail",
    "clipped",
    "entropy",
    "entropy_tokens",
    "right_logp",
    "right_tokens",
    "wrong_logp",
    "wrong_tokens",
)
LOG_ADDED = ("log_sum", "log_sum_squares")
"""Of a vector of sums, those that are added, and the logarithms of those that are; last in it is a maximum."""


@dataclass
class Limit:
    """What a watched quantity may be.

    Args:
        min: The least it may be, in the quantity's unit; None for no such bound.
        max: The most it may be; None for no such bound.
        action: `warn`, once for each time that it is crossed, or `stop` training.
        patience: Measurements in a row that have to lie outside.
    """

    min: float | None = None
    max: float | None = None
    action: Literal["warn", "stop"] = "warn"
    patience: int = 1

    def broken(self, value: float) -> str | None:
        """How the value is outside, in words; None if it is inside."""
        if self.min is not None and value < self.min:
            return f"{value:.4g}, below {self.min:g}"
        if self.max is not None and value > self.max:
            return f"{value:.4g}, above {self.max:g}"
        return None


class CollapseMonitor(Callback):
    """Watches a stage for gains that turn into drift: logs, warns, stops, and prints a table when training ends.

    Of the tokens of optimiser steps, all micro-batches and ranks, it logs under `collapse/`:

    - `ess`: effective sample size of the importance ratios `r = exp(log_ratio)` as a share of the tokens,
      `(sum r)^2 / (n sum r^2)` (Kong 1992), computed from logarithms;
    - `max_log_ratio`: the largest log-ratio, nats; `tail_share`: share of the tokens with a ratio above `tail`;
    - `clipped_share`: share of the tokens with a ratio outside `interval`;
    - `entropy`, `logp_right`, `logp_wrong`: means over their tokens, nats per token; a response is right if its
      reward is 1;
    - `seconds`: what the watching took so far, the mean of the ranks. On an accelerator this includes what the
      device had still to do for the step.

    From validation it takes what the module logs as `val/pass@1`, `val/kl_per_token`, `val/entropy_per_token`,
    `val/mean_length`, `val/truncated` and `val/distinct`. Limits go by these names.

    It works with any LightningModule whose `training_step` returns a dictionary with the `loss` and, detached,

    - `mask`: `(B, T)` bool, the response tokens that count, and any of
    - `log_ratio`: `(B, T)`, log-prob minus that of the anchor of the importance ratio, nats;
    - `entropy`: `(B, T)`, nats;
    - `logp`: `(B, T)`, nats, with `rewards`: `(B,)`.

    What is outside the mask does not count. What a module does not return is not watched.

    All ranks decide the same: about tokens by sums over all ranks, about validation by the values of every rank, of
    which one outside the limit is enough. What was crossed is kept in `reasons`.

    Args:
        limits: Limits by the name that the quantity is logged by, such as `collapse/ess`; None for none.
        every_n_steps: Optimiser steps from one that is watched to the next; a step is watched as a whole or not.
        interval: Ratios inside are neither clipped nor saturated; by default those of DAPO (arXiv 2503.14476).
        tail: Ratio above which a token is in the upper tail.

    Raises:
        ValueError: For a limit of an unknown quantity or without bounds, or a value out of range.
        TrainingDiverged: While training, if a watched quantity is NaN: names it and the step.
    """

    def __init__(
        self,
        limits: dict[str, Limit] | None = None,
        every_n_steps: int = 1,
        interval: tuple[float, float] = (0.8, 1.28),
        tail: float = 10.0,
    ) -> None:
        for name, limit in (limits or {}).items():
            _check(name, limit)
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}: it must be at least 1")
        if not 0 <= interval[0] < interval[1]:
            raise ValueError(f"interval is {interval}: it must be two ratios, the smaller one first")
        if not 0 < tail < math.inf:
            raise ValueError(f"tail is {tail}: it must be a positive, finite ratio")
        self.limits = limits or {}
        self.every_n_steps = every_n_steps
        self.interval = interval
        self.tail = tail
        self.reasons: list[str] = []
        self.rows: list[dict[str, float]] = []
        self.seconds = 0.0
        self._stopped = False
        self._outside: dict[str, int] = {}
        self._since_row = nothing_summed()
        self._micro_batches: list[Tensor] = []
        self._steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once where an interrupted run had been stopped."""
        self._steps = trainer.global_step
        self._micro_batches = []
        if self._stopped:
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a micro-batch to its optimiser step, and judge the step once it is whole."""
        began = perf_counter()
        watched = (self._steps + 1) % self.every_n_steps == 0
        if watched:
            self._micro_batches.append(token_sums(outputs, self.interval, self.tail).to(pl_module.device))
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            if watched:
                self._judge_step(trainer, pl_module)
        self.seconds += perf_counter() - began

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge what validation says, and note it beside what the tokens said since the last one."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        began = perf_counter()
        found = self._validated(trainer, pl_module)
        self._judge(trainer, found)
        self._add_row(trainer, {name: values[0] for name, values in found.items()})
        self.seconds += perf_counter() - began

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the tokens said where nothing was validated, and log what the watching costs."""
        if not self.rows or self.rows[-1]["step"] != trainer.global_step:
            self._add_row(trainer, {})
        pl_module.log("collapse/seconds", self.seconds, sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table, and which limits had nothing to go by."""
        unmeasured = [name for name in self.limits if not any(name in row for row in self.rows)]
        lines = [format_rows(self.rows)] if self.rows else []
        lines += [f"Limits of what was not measured: {', '.join(unmeasured)}"] if unmeasured else []
        if lines:
            _say("\n".join(lines))

    def state_dict(self) -> dict[str, Any]:
        return {
            "reasons": list(self.reasons),
            "rows": [dict(row) for row in self.rows],
            "seconds": self.seconds,
            "stopped": self._stopped,
            "outside": dict(self._outside),
            "since_row": self._since_row.tolist(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reasons, self.rows = state_dict["reasons"], state_dict["rows"]
        self.seconds, self._stopped = state_dict["seconds"], state_dict["stopped"]
        self._outside = state_dict["outside"]
        self._since_row = torch.tensor(state_dict["since_row"], dtype=torch.float64)

    def _judge_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own, self._micro_batches = merged(torch.stack(self._micro_batches)), []
        step = merged(_gathered(pl_module, own)).cpu()
        self._since_row = merged(torch.stack([self._since_row, step]))
        found = token_quantities(step)
        # By the module's own log, Lightning would log the values again at every step that is not watched.
        for logger in trainer.loggers:
            logger.log_metrics(found, step=self._steps - 1)  # Where Lightning counts the step's other values.
        self._judge(trainer, {name: [value] for name, value in found.items()})

    def _validated(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, list[float]]:
        """What the ranks that measured it say of each quantity; a module need not have reduced it over ranks."""
        names = [f"val/{name}" for name in OF_VALIDATION]
        own = [trainer.callback_metrics.get(name) for name in names]
        values = [0.0 if value is None else float(value) for value in own]
        measured = [0.0 if value is None else 1.0 for value in own]
        gathered = _gathered(pl_module, torch.tensor([*values, *measured], dtype=torch.float64)).tolist()
        said = {name: [row[n] for row in gathered if row[n + len(names)]] for n, name in enumerate(names)}
        return {name: values for name, values in said.items() if values}

    def _judge(self, trainer: Trainer, found: Mapping[str, Sequence[float]]) -> None:
        """Compare what all ranks know with the limits.

        Raises:
            TrainingDiverged: If any of it is NaN.
        """
        step = trainer.global_step
        for name, values in found.items():
            if any(math.isnan(value) for value in values):
                raise TrainingDiverged(f"optimiser step {step}: {name} is NaN. The last checkpoint is untouched")
        for name, limit in self.limits.items():
            if name not in found:
                continue
            broken = [words for value in found[name] if (words := limit.broken(value)) is not None]
            self._outside[name] = self._outside.get(name, 0) + 1 if broken else 0
            if self._outside[name] != limit.patience:
                continue
            lasting = f" ({limit.patience} measurements in a row)" if limit.patience > 1 else ""
            end = "; training stops" if limit.action == "stop" else ""
            self.reasons.append(f"optimiser step {step}: {name} is {broken[0]}{lasting}{end}")
            rank_zero_warn(self.reasons[-1])
            if limit.action == "stop":
                self._stopped = trainer.should_stop = True

    def _add_row(self, trainer: Trainer, validated: Mapping[str, float]) -> None:
        found = {**token_quantities(self._since_row), **validated}
        self._since_row = nothing_summed()
        if found:
            self.rows.append({"epoch": trainer.current_epoch + 1, "step": trainer.global_step, **found})


def token_sums(outputs: Any, interval: tuple[float, float], tail: float) -> Tensor:
    """What a micro-batch adds to its step: float64, the sums `ADDED`, the `LOG_ADDED`, and the largest log-ratio.

    Args:
        outputs: What `training_step` returned; see `CollapseMonitor`.
        interval: See `CollapseMonitor`.
        tail: See `CollapseMonitor`.
    """
    if not isinstance(outputs, Mapping) or "mask" not in outputs:
        return nothing_summed()
    mask = outputs["mask"]
    sums = nothing_summed().to(mask.device)
    if "log_ratio" in outputs:
        ratios = outputs["log_ratio"].detach().double()
        low, high = interval
        outside = (ratios > math.log(high)) | (ratios < (math.log(low) if low > 0 else -math.inf))
        counted = torch.where(mask, ratios, -torch.inf)
        sums[0] = mask.sum()
        sums[1] = (mask & (ratios > math.log(tail))).sum()
        sums[2] = (mask & outside).sum()
        sums[-3] = counted.flatten().logsumexp(0)
        sums[-2] = (2 * counted).flatten().logsumexp(0)
        sums[-1] = counted.max()
    if "entropy" in outputs:
        sums[3] = masked_sum(outputs["entropy"].detach().double(), mask)
        sums[4] = mask.sum()
    if "logp" in outputs and "rewards" in outputs:
        logps, is_right = outputs["logp"].detach().double(), (outputs["rewards"] == 1)[:, None]
        for place, chosen in ((5, mask & is_right), (7, mask & ~is_right)):
            sums[place] = masked_sum(logps, chosen)
            sums[place + 1] = chosen.sum()
    return sums


def nothing_summed() -> Tensor:
    """The sums over no tokens."""
    sums = torch.zeros(len(ADDED) + len(LOG_ADDED) + 1, dtype=torch.float64)
    sums[len(ADDED) :] = -torch.inf
    return sums


def merged(sums: Tensor) -> Tensor:
    """The sums `(S,)` of several parts `(N, S)`: micro-batches, ranks or steps."""
    added, log_added, largest = sums.split((len(ADDED), len(LOG_ADDED), 1), dim=1)
    return torch.cat([added.sum(0), log_added.logsumexp(0), largest.amax(0)])


def token_quantities(sums: Tensor) -> dict[str, float]:
    """The quantities `collapse/…` that sums `(S,)` tell, without those that no token tells of."""
    of = dict(zip((*ADDED, *LOG_ADDED, "max_log_ratio"), sums.tolist(), strict=True))
    found = {}
    if n := of["ratio_tokens"]:
        found["ess"] = math.exp(2 * of["log_sum"] - of["log_sum_squares"] - math.log(n))
        found["max_log_ratio"] = of["max_log_ratio"]
        found["tail_share"] = of["tail"] / n
        found["clipped_share"] = of["clipped"] / n
    if n := of["entropy_tokens"]:
        found["entropy"] = of["entropy"] / n
    for kind in ("right", "wrong"):
        if n := of[f"{kind}_tokens"]:
            found[f"logp_{kind}"] = of[f"{kind}_logp"] / n
    return {f"collapse/{name}": value for name, value in found.items()}


def format_rows(rows: Sequence[Mapping[str, float]]) -> str:
    """The table of what was measured: a line for each validation, the one of the highest pass@1 marked.

    The values of the tokens are over those that passed by since the line before.

    Args:
        rows: At least one.
    """
    columns = {
        title: next(name for name in names if any(name in row for row in rows))
        for title, names in COLUMNS.items()
        if any(name in row for row in rows for name in names)
    }
    highest = max((row for row in rows if "val/pass@1" in row), key=lambda row: row["val/pass@1"], default=None)
    lines = [["epoch", "step", *columns, ""]]
    for row in rows:
        cells = [f"{row[name]:.4g}" if name in row else "" for name in columns.values()]
        lines.append([f"{row['epoch']:.0f}", f"{row['step']:.0f}", *cells, "highest" if row is highest else ""])
    return aligned(lines)


def _check(name: str, limit: Limit) -> None:
    # Not when a limit is made: jsonargparse tries that among other types, and would keep the reason to itself.
    if name not in (*(f"collapse/{own}" for own in OF_TOKENS), *(f"val/{own}" for own in OF_VALIDATION)):
        raise ValueError(
            f"limits: {name!r} is not watched; of collapse/ there are {', '.join(OF_TOKENS)}, "
            f"of val/ {', '.join(OF_VALIDATION)}"
        )
    bounds = [bound for bound in (limit.min, limit.max) if bound is not None]
    if not bounds or any(math.isnan(bound) for bound in bounds) or bounds != sorted(bounds):
        raise ValueError(f"limits: {name} has min {limit.min} and max {limit.max}: at least one number, min below max")
    if limit.action not in ("warn", "stop"):
        raise ValueError(f"limits: the action of {name} is {limit.action!r}: it must be warn or stop")
    if limit.patience < 1:
        raise ValueError(f"limits: the patience of {name} is {limit.patience}: it must be at least 1")


def _gathered(pl_module: LightningModule, vector: Tensor) -> Tensor:
    """A vector `(S,)` of each rank: `(ranks, S)`."""
    found = pl_module.all_gather(vector.to(pl_module.device))
    assert isinstance(found, Tensor)
    return found.reshape(-1, len(vector))


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)
