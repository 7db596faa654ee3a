"""The report's plots as PNG, each drawn for light and for dark pages; needs matplotlib, the extra `report`."""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from textwrap import fill
from typing import Any

import numpy as np

from ..text import visible
from .drawing import MARKERS, root_scale
from .measures import Bin, Kind
from .read import Log, Measured, Round, Run

FIGURE_SIZE = (4.8, 3.6)
"""Inches. A page as wide as a phone scales larger figures down until nobody can read them."""

DPI = 150

LEGEND_LINE_LENGTH = 24
"""Greatest number of characters of a name on a line of a legend, which has two columns."""

BUDGET_LABEL = "budget"
"""Entry of a legend that comes last."""


@dataclass(frozen=True)
class Theme:
    """Colours of a page, distinct also for readers who do not see red and green; neighbours differ in lightness too.

    Attributes:
        background: Of page and plots.
        text: Of axes and letters.
        grid: Of grid lines.
        policies: By name; `further` for other teachers.
        series: For runs.
    """

    background: str
    text: str
    grid: str
    policies: Mapping[str, str]
    series: Sequence[str]

    def policy(self, name: str) -> str:
        """Colour of a policy."""
        return self.policies.get(name, self.policies["further"])


LIGHT = Theme(
    background="#ffffff",
    text="#24292f",
    grid="#d8dee4",
    policies={
        "base": "#57606a",
        "teacher": "#c65102",
        "unlearned": "#a0438b",
        "student": "#0065b3",
        "further": "#00795c",
    },
    series=("#0065b3", "#c65102", "#00795c", "#a0438b", "#8a6d00", "#4a4a4a"),
)

DARK = Theme(
    background="#14181d",
    text="#d6dce3",
    grid="#343c46",
    policies={
        "base": "#a5b0bc",
        "teacher": "#ff9a57",
        "unlearned": "#e79bd3",
        "student": "#62b8ff",
        "further": "#3fd0a6",
    },
    series=("#62b8ff", "#ff9a57", "#3fd0a6", "#e79bd3", "#e2c84f", "#c4c4c4"),
)

Draw = Callable[[Theme], bytes]
"""Draws a plot in the colours of a page."""


def accuracy_of_runs(runs: Sequence[Run], theme: Theme) -> bytes:
    """Plot of accuracy against KL to the first policy: each run is one line from its base policy through its students.

    Of the first run, the other policies are shown as well.
    """
    with _drawing(theme) as drawing:
        axes = drawing.axes
        highest = [0.0]
        for run, color, marker in zip(runs, cycle(theme.series), cycle("Dos^vPX"), strict=False):
            rows = chain_of(run)
            style = {"color": color, "marker": marker, "linestyle": "-"}
            _points(axes, rows, "kl_per_token_to_first", label=_label(run.name), **style)
            highest += _kl_ends(rows, "kl_per_token_to_first")
        for entry in runs[0].rounds:
            for name in [name for name in entry.policies if name not in ("base", "student")]:
                row = entry.policies[name]
                style = {"color": theme.policy(name), "marker": MARKERS.get(name, "x"), "linestyle": "none"}
                label = _label(name) if entry is runs[0].rounds[0] else None
                _points(axes, [row], "kl_per_token_to_first", label=label, markerfacecolor="none", **style)
                highest += _kl_ends([row], "kl_per_token_to_first")
        root_scale(axes, "x", _axis_end(highest))
        axes.set_xlabel("KL to the first policy (nats/token, root scale)")
        axes.set_ylabel("pass@1")
    return drawing.png


def accuracy_of_round(entry: Round, theme: Theme) -> bytes:
    """Plot of accuracy against KL to the round's base policy: all policies, and the epochs of those in training."""
    with _drawing(theme) as drawing:
        axes = drawing.axes
        highest = [0.0]
        for name, log in entry.logs.items():
            # Training begins at the base policy, which stages do not validate.
            begin = [entry.policies["base"]] if "base" in entry.policies else []
            rows = [*begin, *validations(log)]
            style = {"color": theme.policy(name), "marker": ".", "linewidth": 1.0, "alpha": 0.75}
            axes.plot([_kl(row) for row in rows], [row["pass@1"] for row in rows], markersize=5, **style)
            highest += [_kl(row) for row in rows]
        for name, row in entry.policies.items():
            style = {"color": theme.policy(name), "marker": MARKERS.get(name, "x"), "linestyle": "none"}
            _points(axes, [row], "kl_per_token", label=_label(name), **style)
            highest += _kl_ends([row], "kl_per_token")
        if entry.budget is not None:
            axes.axvline(entry.budget, color=theme.text, linestyle=":", linewidth=1.2, label=BUDGET_LABEL)
            highest.append(entry.budget)
        root_scale(axes, "x", _axis_end(highest))
        axes.set_xlabel("KL to the round's base (nats/token, root scale)")
        axes.set_ylabel("pass@1")
        axes.set_title(f"Round {entry.number}", loc="left")
    return drawing.png


def over_steps(run: Run, trained: str, sampled: str, label: str, theme: Theme, root: bool = False) -> bytes:
    """Plot of a metric over the optimiser steps of each stage; rounds follow one another.

    Args:
        run: The run.
        trained: The metric of training batches.
        sampled: The metric of fresh samples.
        label: Name and unit of the metric.
        theme: Colours.
        root: Whether to draw it on the scale of its square root.
    """
    with _drawing(theme) as drawing:
        axes = drawing.axes
        start, highest, named, starts = 0, [0.0], set(), []
        for entry in run.rounds:
            starts.append(start)
            for name, log in entry.logs.items():
                color = theme.policy(name)
                steps, values = _series(log, trained, start)
                axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.6)
                highest += values
                steps, values = _series(log, sampled, start)
                errors = [log.get(f"{sampled}_stderr", {}).get(step - start, 0.0) for step in steps]
                style = {"color": color, "marker": MARKERS.get(name, "x"), "markersize": 4}
                axes.errorbar(steps, values, yerr=errors, linewidth=1.2, elinewidth=0.8, **style)
                highest += values
                if name not in named:  # Also of a policy of which there is a line alone.
                    axes.plot([], [], label=_label(name), **style)
                named.add(name)
            start += _round_steps(entry)
        if root:
            root_scale(axes, "y", _axis_end(highest))
            _budget_lines(axes, run, [*starts, start], theme)
        else:
            axes.set_ylim(bottom=0)
        for entry, begins in zip(run.rounds, starts, strict=True) if len(starts) > 1 else ():
            axes.axvline(begins, color=theme.text, linewidth=0.8)
            axes.text(begins, 1.0, f" round {entry.number}", transform=axes.get_xaxis_transform(), va="bottom", size=9)
        axes.set_xlim(0, 1.02 * max(start, 1))
        axes.set_xlabel("optimiser steps of a stage, round after round")
        axes.set_ylabel(label)
    return drawing.png


def by_position(bins: Mapping[str, Sequence[Bin]], theme: Theme) -> bytes:
    """Plot of KL at each position, with a band of one standard error, and below how many responses reach it."""
    with _drawing(theme, nrows=2, height_ratios=(4, 1)) as drawing:
        upper, lower = drawing.figure.axes
        for name, found in bins.items():
            middle = [(b.first + b.last) / 2 for b in found]
            values = [max(b.kl.value, 0.0) for b in found]
            errors = [_finite_or_zero(b.kl.stderr) for b in found]
            color = theme.policy(name)
            upper.plot(middle, values, color=color, marker=MARKERS.get(name, "x"), markersize=3.5, label=_label(name))
            low = [max(v - e, 0.0) for v, e in zip(values, errors, strict=True)]
            high = [v + e for v, e in zip(values, errors, strict=True)]
            upper.fill_between(middle, low, high, color=color, alpha=0.25, linewidth=0)
            lower.plot(middle, [b.responses for b in found], color=color, linewidth=1.2)
        reach = [max(b.kl.value, 0.0) + _finite_or_zero(b.kl.stderr) for found in bins.values() for b in found]
        root_scale(upper, "y", _axis_end(reach))
        upper.tick_params(labelbottom=False)
        upper.set_ylabel("KL (nats per token,\nroot scale)")
        lower.set_ylim(bottom=0)
        lower.set_ylabel("responses")
        lower.set_xlabel("position of the token in its response")
        lower.sharex(upper)
    return drawing.png


def by_kind(kinds: Mapping[str, Sequence[Kind]], theme: Theme) -> bytes:
    """Plot of KL at the tokens of each kind, as bars with standard errors."""
    names = list(dict.fromkeys(kind.name for found in kinds.values() for kind in found))
    with _drawing(theme) as drawing:
        axes = drawing.axes
        height = 0.8 / max(len(kinds), 1)
        for number, (policy, found) in enumerate(kinds.items()):
            places = [names.index(kind.name) + number * height for kind in found]
            values = [max(kind.kl.value, 0.0) for kind in found]
            errors = [_finite_or_zero(kind.kl.stderr) for kind in found]
            bars = {"color": theme.policy(policy), "ecolor": theme.text, "error_kw": {"elinewidth": 0.9}}
            axes.barh(places, values, height * 0.9, xerr=errors, label=_label(policy), **bars)
        middles = [number + 0.4 - height / 2 for number in range(len(names))]
        axes.set_yticks(middles, [name.replace(", ", ",\n") for name in names])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("KL (nats per token)")
    return drawing.png


def chain_of(run: Run) -> list[Measured]:
    """Evaluations of the first base policy and of the student of each round."""
    chain = [entry.policies["base"] for entry in run.rounds[:1] if "base" in entry.policies]
    return chain + [entry.policies["student"] for entry in run.rounds if "student" in entry.policies]


def validations(log: Log) -> list[Measured]:
    """Validations of a stage, in the order of their steps."""
    steps = log.get("val/pass@1", {}).keys() & log.get("val/kl_per_token", {}).keys()
    names = [name for name in log if name.startswith("val/")]
    return [
        {name.removeprefix("val/"): log[name][step] for name in names if step in log[name]} for step in sorted(steps)
    ]


@dataclass
class _Drawing:
    """A figure, its first axes, and the PNG that it has become once its `with` has ended."""

    figure: Any
    axes: Any
    png: bytes = b""


@contextmanager
def _drawing(theme: Theme, **grid: Any) -> Iterator[_Drawing]:
    """A figure in the colours of a theme, to be drawn on; its legend is put below at the end."""
    import matplotlib
    from matplotlib.figure import Figure  # Without pyplot: no display and no global state.

    colored = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    style: dict[Any, Any] = {name: theme.text for name in colored}
    style |= {"figure.facecolor": theme.background, "axes.facecolor": theme.background, "grid.color": theme.grid}
    style |= {"grid.linewidth": 0.6, "font.size": 11, "legend.fontsize": 10}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=FIGURE_SIZE, dpi=DPI, layout="constrained")
        figure.subplots(**grid)
        for axes in figure.axes:
            axes.grid(True)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        drawing = _Drawing(figure, figure.axes[0])
        yield drawing
        handles, labels = drawing.axes.get_legend_handles_labels()
        if labels:
            order = sorted(range(len(labels)), key=lambda i: labels[i] == BUDGET_LABEL)
            shown = {"handles": [handles[i] for i in order], "labels": [labels[i] for i in order]}
            columns = 3 if max(map(len, labels)) <= LEGEND_LINE_LENGTH // 2 else 2
            figure.legend(loc="outside lower center", ncols=columns, frameon=False, **shown)
        drawing.png = _small_png(figure)


def _small_png(figure: Any) -> bytes:
    """PNG of few colours, a third as large: a page holds many, each of them twice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image  # matplotlib needs it too.

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    file = io.BytesIO()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(128).save(file, "png", optimize=True)
    return file.getvalue()


def _points(axes: Any, rows: Sequence[Measured], kl: str, **style: Any) -> None:
    """Draw policies as points with their standard errors."""
    axes.errorbar(
        [max(row[kl], 0.0) for row in rows],
        [row["pass@1"] for row in rows],
        xerr=[_finite_or_zero(row[f"{kl}_stderr"]) for row in rows],
        yerr=[_finite_or_zero(row["pass@1_stderr"]) for row in rows],
        markersize=6,
        linewidth=1.2,
        elinewidth=0.8,
        clip_on=False,
        zorder=3,
        **style,
    )


def _kl_ends(rows: Sequence[Measured], kl: str) -> list[float]:
    """Upper ends of the error bars of KL."""
    return [row[kl] + _finite_or_zero(row[f"{kl}_stderr"]) for row in rows]


def _series(log: Log, name: str, start: int) -> tuple[list[int], list[float]]:
    """Steps from `start` on and values of a metric, none of them below zero."""
    values = log.get(name, {})
    return [start + step for step in values], [max(value, 0.0) for value in values.values()]


def _round_steps(entry: Round) -> int:
    """Number of steps of the longest stage of a round."""
    return max((step + 1 for log in entry.logs.values() for values in log.values() for step in values), default=0)


def _budget_lines(axes: Any, run: Run, ends: Sequence[int], theme: Theme) -> None:
    """Draw a line at the budget of each round that has one."""
    label: str | None = BUDGET_LABEL
    for entry, begins, stops in zip(run.rounds, ends[:-1], ends[1:], strict=True):
        if entry.budget is not None:
            axes.hlines(entry.budget, begins, stops, color=theme.text, linestyle=":", linewidth=1.2, label=label)
            label = None


def _kl(row: Measured) -> float:
    """KL per token; rounding may leave that of the base policy to itself below zero."""
    return max(row["kl_per_token"], 0.0)


def _axis_end(values: Iterable[float]) -> float:
    """End of an axis that begins at 0: a policy may have diverged, and an axis cannot be empty."""
    return max((value for value in values if math.isfinite(value)), default=0.0) or 1.0


def _label(name: str) -> str:
    """A name as a legend takes it: on short lines; formulas stand between dollars, and `_` would hide it."""
    text = fill(visible(name), LEGEND_LINE_LENGTH).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _finite_or_zero(value: float) -> float:
    """Standard error, or 0 where it is unknown, as with a single prompt."""
    return value if math.isfinite(value) else 0.0
