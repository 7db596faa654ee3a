"""Monitor of policy collapse: accuracy, entropy and importance ratios of a stage, with limits that warn or stop."""

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

from ..metrics import (
    ImportanceSums,
    check_ratio_bounds,
    empty_importance_sums,
    importance_statistics,
    importance_sums,
    merge_importance_sums,
)
from ..modules.training import TrainingDiverged
from ..objectives.reduction import masked_sum
from ..text import aligned

MEANS = ("entropy", "logp_correct", "logp_incorrect")
"""Quantities that are means over tokens, in nats per token."""

TOKEN_QUANTITIES = ("ess", "max_log_ratio", "tail_share", "clipped_share", *MEANS)
"""Quantities of the tokens of optimiser steps, logged as `collapse/NAME`."""

VALIDATION_QUANTITIES = ("pass@1", "kl_per_token", "entropy_per_token", "mean_length", "truncated", "distinct")
"""Quantities of validation, where the module logs them as `val/NAME`."""

TABLE_COLUMNS = {
    "pass@1": ("val/pass@1",),
    "KL/token": ("val/kl_per_token",),
    "entropy": ("val/entropy_per_token", "collapse/entropy"),
    "logp correct": ("collapse/logp_correct",),
    "logp incorrect": ("collapse/logp_incorrect",),
    "ESS": ("collapse/ess",),
    "distinct": ("val/distinct",),
}
"""Columns of the table at the end, and the quantity in each: the first of those named that was ever measured."""

IMPORTANCE_SUMS = len(ImportanceSums._fields)
"""Number of importance sums, with which a vector of token sums begins."""


@dataclass
class Limit:
    """Limit of a monitored quantity.

    Args:
        min: Least value inside the limit, in the quantity's unit; None for no such bound.
        max: Greatest value inside the limit; None for no such bound.
        action: `warn`, once for each time that the limit is crossed, or `stop` training.
        patience: Number of measurements in a row that have to lie outside.
    """

    min: float | None = None
    max: float | None = None
    action: Literal["warn", "stop"] = "warn"
    patience: int = 1

    def violation(self, value: float) -> str | None:
        """Description of how a value lies outside the limit; None if it is inside."""
        if self.min is not None and value < self.min:
            return f"{value:.4g}, below {self.min:g}"
        if self.max is not None and value > self.max:
            return f"{value:.4g}, above {self.max:g}"
        return None


class CollapseMonitor(Callback):
    """Monitor of a training stage that logs signs of collapse, warns or stops, and prints a table at the end.

    Of the tokens of optimiser steps, all micro-batches and ranks, it logs under `collapse/`:

    - `ess`: effective sample size of the importance ratios `r = exp(log_ratio)` as a share of the tokens,
      `(sum r)^2 / (n sum r^2)` (Kong 1992), computed from logarithms;
    - `max_log_ratio`: the largest log-ratio, nats; `tail_share`: share of the tokens with a ratio above `tail`;
    - `clipped_share`: share of the tokens with a ratio outside `interval`;
    - `entropy`, `logp_correct`, `logp_incorrect`: means over their tokens, nats per token; what a correct
      response is says `correct`, or else a reward of at least 1;
    - `seconds`: time that the monitor has taken so far, the mean of the ranks. On an accelerator this includes what
      the device had still to do for the step.

    Of validation it reads what the module logs as `val/pass@1`, `val/kl_per_token`, `val/entropy_per_token`,
    `val/mean_length`, `val/truncated` and `val/distinct`. Limits go by these names.

    It works with any LightningModule whose `training_step` returns a dictionary with the `loss` and, detached,

    - `mask`: `(B, T)` bool, the response tokens that count, and any of
    - `log_ratio`: `(B, T)`, log-prob minus the old log-prob, that of the importance ratio's denominator, nats;
    - `entropy`: `(B, T)`, nats;
    - `logp`: `(B, T)`, nats, with `correct`: `(B,)` bool, or `rewards`: `(B,)`.

    What is outside the mask does not count. What a module does not return is not monitored.

    All ranks decide the same. Limits of tokens are compared with sums over all ranks. Limits of validation are
    compared with the value of every rank, and one outside is enough. Each crossing is described in `reasons`.

    Args:
        limits: Limits by the name that the quantity is logged by, such as `collapse/ess`; None for none.
        every_n_steps: Optimiser steps from one that is monitored to the next; a step is monitored as a whole or not.
        interval: Ratios inside are neither clipped nor saturated; by default those of DAPO (arXiv 2503.14476).
        tail: Ratio above which a token is in the upper tail.

    Raises:
        ValueError: For a limit of an unknown quantity or without bounds, or a value out of range.
        TrainingDiverged: While training, if a monitored quantity is NaN: names it and the step.
    """

    def __init__(
        self,
        limits: dict[str, Limit] | None = None,
        every_n_steps: int = 1,
        interval: tuple[float, float] = (0.8, 1.28),
        tail: float = 10.0,
    ) -> None:
        for name, limit in (limits or {}).items():
            _check_limit(name, limit)
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}: it must be at least 1")
        check_ratio_bounds(interval, tail)
        self.limits = limits or {}
        self.every_n_steps = every_n_steps
        self.interval = interval
        self.tail = tail
        self.reasons: list[str] = []
        self.rows: list[dict[str, float]] = []
        self.seconds = 0.0
        self._stopped = False
        self._measurements_outside: dict[str, int] = {}
        self._sums_since_row = empty_token_sums()
        self._micro_batches: list[Tensor] = []
        self._steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once if a limit had stopped the run before it was interrupted."""
        self._steps = trainer.global_step
        self._micro_batches = []
        if self._stopped:
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a micro-batch to its optimiser step; log the step and check its limits after the last micro-batch."""
        start = perf_counter()
        monitored = (self._steps + 1) % self.every_n_steps == 0
        if monitored:
            self._micro_batches.append(token_sums(outputs, self.interval, self.tail).to(pl_module.device))
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            if monitored:
                self._finish_step(trainer, pl_module)
        self.seconds += perf_counter() - start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the limits of validation, and add a row with it and the tokens since the last row."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        start = perf_counter()
        measured = self._validation_values(trainer, pl_module)
        self._check_limits(trainer, measured)
        self._add_row(trainer, {name: values[0] for name, values in measured.items()})
        self.seconds += perf_counter() - start

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a row of the tokens if the epoch had no validation, and log the time that the monitor takes."""
        if not self.rows or self.rows[-1]["step"] != trainer.global_step:
            self._add_row(trainer, {})
        pl_module.log("collapse/seconds", self.seconds, sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table, and the limits whose quantities were never measured."""
        unmeasured = [name for name in self.limits if not any(name in row for row in self.rows)]
        lines = [format_rows(self.rows)] if self.rows else []
        lines += [f"Limits of what was not measured: {', '.join(unmeasured)}"] if unmeasured else []
        if lines:
            _print("\n".join(lines))

    def state_dict(self) -> dict[str, Any]:
        return {
            "reasons": list(self.reasons),
            "rows": [dict(row) for row in self.rows],
            "seconds": self.seconds,
            "stopped": self._stopped,
            "measurements_outside": dict(self._measurements_outside),
            "sums_since_row": self._sums_since_row.tolist(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reasons, self.rows = state_dict["reasons"], state_dict["rows"]
        self.seconds, self._stopped = state_dict["seconds"], state_dict["stopped"]
        self._measurements_outside = state_dict["measurements_outside"]
        self._sums_since_row = torch.tensor(state_dict["sums_since_row"], dtype=torch.float64)

    def _finish_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reduce the step's sums over micro-batches and ranks, log its quantities, and check their limits."""
        own, self._micro_batches = merge_token_sums(torch.stack(self._micro_batches)), []
        step = merge_token_sums(_gather(pl_module, own)).cpu()
        self._sums_since_row = merge_token_sums(torch.stack([self._sums_since_row, step]))
        measured = token_quantities(step)
        # By the module's own log, Lightning would log the values again at every step that is not monitored.
        for logger in trainer.loggers:
            logger.log_metrics(measured, step=self._steps - 1)  # Where Lightning counts the step's other values.
        self._check_limits(trainer, {name: [value] for name, value in measured.items()})

    def _validation_values(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, list[float]]:
        """Values of each quantity on the ranks that measured it; a module need not have reduced it over ranks."""
        names = [f"val/{name}" for name in VALIDATION_QUANTITIES]
        own = [trainer.callback_metrics.get(name) for name in names]
        values = [0.0 if value is None else float(value) for value in own]
        is_measured = [0.0 if value is None else 1.0 for value in own]
        ranks = _gather(pl_module, torch.tensor([*values, *is_measured], dtype=torch.float64)).tolist()
        by_name = {name: [rank[n] for rank in ranks if rank[n + len(names)]] for n, name in enumerate(names)}
        return {name: values for name, values in by_name.items() if values}

    def _check_limits(self, trainer: Trainer, measured: Mapping[str, Sequence[float]]) -> None:
        """Compare values that all ranks know with the limits.

        Raises:
            TrainingDiverged: If one of them is NaN.
        """
        step = trainer.global_step
        for name, values in measured.items():
            if any(math.isnan(value) for value in values):
                raise TrainingDiverged(f"optimiser step {step}: {name} is NaN. The last checkpoint is untouched")
        for name, limit in self.limits.items():
            if name not in measured:
                continue
            violations = [text for value in measured[name] if (text := limit.violation(value)) is not None]
            self._measurements_outside[name] = self._measurements_outside.get(name, 0) + 1 if violations else 0
            if self._measurements_outside[name] != limit.patience:
                continue
            duration = f" ({limit.patience} measurements in a row)" if limit.patience > 1 else ""
            end = "; training stops" if limit.action == "stop" else ""
            self.reasons.append(f"optimiser step {step}: {name} is {violations[0]}{duration}{end}")
            rank_zero_warn(self.reasons[-1])
            if limit.action == "stop":
                self._stopped = trainer.should_stop = True

    def _add_row(self, trainer: Trainer, validated: Mapping[str, float]) -> None:
        measured = {**token_quantities(self._sums_since_row), **validated}
        self._sums_since_row = empty_token_sums()
        if measured:
            self.rows.append({"epoch": trainer.current_epoch + 1, "step": trainer.global_step, **measured})


def empty_token_sums() -> Tensor:
    """Sums `(S,)` over no tokens: `ImportanceSums`, then the total and the number of tokens of each of `MEANS`."""
    means = torch.zeros(2 * len(MEANS), dtype=torch.float64)
    return torch.cat([torch.stack(empty_importance_sums()), means])


def token_sums(outputs: Any, interval: tuple[float, float], tail: float) -> Tensor:
    """Sums `(S,)` that a micro-batch adds to its optimiser step, float64.

    Args:
        outputs: What `training_step` returned; see `CollapseMonitor`.
        interval: See `CollapseMonitor`.
        tail: See `CollapseMonitor`.
    """
    if not isinstance(outputs, Mapping) or "mask" not in outputs:
        return empty_token_sums()
    mask = outputs["mask"]
    sums = empty_token_sums().to(mask.device)
    if "log_ratio" in outputs:
        sums[:IMPORTANCE_SUMS] = torch.stack(importance_sums(outputs["log_ratio"], mask, interval, tail))
    averaged: dict[str, tuple[Tensor, Tensor]] = {}
    if "entropy" in outputs:
        averaged["entropy"] = outputs["entropy"], mask
    if "logp" in outputs and ("correct" in outputs or "rewards" in outputs):
        correct = outputs["correct"] if "correct" in outputs else outputs["rewards"] >= 1
        is_correct = correct[:, None]
        averaged["logp_correct"] = outputs["logp"], mask & is_correct
        averaged["logp_incorrect"] = outputs["logp"], mask & ~is_correct
    for name, (values, tokens) in averaged.items():
        place = IMPORTANCE_SUMS + 2 * MEANS.index(name)
        sums[place] = masked_sum(values.detach().double(), tokens)
        sums[place + 1] = tokens.sum()
    return sums


def merge_token_sums(parts: Tensor) -> Tensor:
    """Sums `(S,)` over several parts `(N, S)`: micro-batches, ranks or optimiser steps."""
    importance = merge_importance_sums(ImportanceSums(*parts[:, :IMPORTANCE_SUMS].unbind(1)))
    return torch.cat([torch.stack(importance), parts[:, IMPORTANCE_SUMS:].sum(0)])


def token_quantities(sums: Tensor) -> dict[str, float]:
    """Quantities `collapse/NAME` of the tokens behind sums `(S,)`; those that no token was measured for are absent."""
    found: dict[str, float] = {}
    importance = ImportanceSums(*sums[:IMPORTANCE_SUMS])
    if importance.tokens > 0:
        statistics = importance_statistics(importance)
        found["ess"] = statistics.effective_sample_size.item()
        found["max_log_ratio"] = statistics.max_log_ratio.item()
        found["tail_share"] = statistics.tail_share.item()
        found["clipped_share"] = statistics.clipped_share.item()
    for name, (total, tokens) in zip(MEANS, sums[IMPORTANCE_SUMS:].reshape(-1, 2).tolist(), strict=True):
        if tokens:
            found[name] = total / tokens
    return {f"collapse/{name}": value for name, value in found.items()}


def format_rows(rows: Sequence[Mapping[str, float]]) -> str:
    """Table with a line for each validation; the one of the highest pass@1 is marked.

    Quantities of tokens are over the optimiser steps since the line before.

    Args:
        rows: At least one.
    """
    columns = {
        title: next(name for name in names if any(name in row for row in rows))
        for title, names in TABLE_COLUMNS.items()
        if any(name in row for row in rows for name in names)
    }
    highest = max((row for row in rows if "val/pass@1" in row), key=lambda row: row["val/pass@1"], default=None)
    lines = [["epoch", "step", *columns, ""]]
    for row in rows:
        cells = [f"{row[name]:.4g}" if name in row else "" for name in columns.values()]
        lines.append([f"{row['epoch']:.0f}", f"{row['step']:.0f}", *cells, "highest" if row is highest else ""])
    return aligned(lines)


def _check_limit(name: str, limit: Limit) -> None:
    # Not when a limit is made: jsonargparse tries that among other types, and would keep the reason to itself.
    known = [f"collapse/{quantity}" for quantity in TOKEN_QUANTITIES]
    known += [f"val/{quantity}" for quantity in VALIDATION_QUANTITIES]
    if name not in known:
        raise ValueError(
            f"limits: {name!r} is not monitored; of collapse/ there are {', '.join(TOKEN_QUANTITIES)}, "
            f"of val/ {', '.join(VALIDATION_QUANTITIES)}"
        )
    bounds = [bound for bound in (limit.min, limit.max) if bound is not None]
    if not bounds or any(math.isnan(bound) for bound in bounds) or bounds != sorted(bounds):
        raise ValueError(f"limits: {name} has min {limit.min} and max {limit.max}: at least one number, min below max")
    if limit.action not in ("warn", "stop"):
        raise ValueError(f"limits: the action of {name} is {limit.action!r}: it must be warn or stop")
    if limit.patience < 1:
        raise ValueError(f"limits: the patience of {name} is {limit.patience}: it must be at least 1")


def _gather(pl_module: LightningModule, vector: Tensor) -> Tensor:
    """Vectors `(S,)` of all ranks as `(ranks, S)`."""
    gathered = pl_module.all_gather(vector.to(pl_module.device))
    assert isinstance(gathered, Tensor)
    return gathered.reshape(-1, len(vector))


@rank_zero_only
def _print(text: str) -> None:
    print(text, flush=True)
