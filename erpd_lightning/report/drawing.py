"""Plot of a preview, and scales that plots share; needs matplotlib, the extra `report`."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Targets and policies differ by colour, and policies by shape, so that neither needs red and green.
TARGET_COLOUR, POLICY_COLOUR = "#0072b2", "#444444"
MARKERS = {"base": "s", "teacher": "^", "unlearned": "v", "student": "D"}


def draw_preview(previews: Sequence[Mapping[str, Any]], policies: Mapping[str, Mapping[str, Any]], title: str) -> bytes:
    """Plot of accuracy against KL to the base policy, with standard errors, as a PNG.

    KL is drawn on the scale of its square root, on which small budgets and a policy far away are seen together.

    Args:
        previews: Measurements of targets, at least one, by the keys of `preview.json`; a line joins them.
        policies: Evaluations of policies, by the keys of `summary.json`, as points.
        title: Title of the plot.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # Without pyplot: no display and no global state.

    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    _points(axes, previews, label="target", color=TARGET_COLOUR, marker="o", linestyle="-")
    for name, row in policies.items():
        _points(axes, [row], label=name, color=POLICY_COLOUR, marker=MARKERS.get(name, "x"), linestyle="none")
    highest = max(_kl(row) + _stderr(row, "kl_per_token") for row in [*previews, *policies.values()]) or 1.0
    root_scale(axes, "x", highest)
    axes.set_xlabel("KL to the base policy (nats per token, square-root scale)")
    axes.set_ylabel("pass@1")
    axes.set_title(title, loc="left")
    axes.margins(y=0.15)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def root_scale(axes: Any, which: str, highest: float) -> None:
    """Give the axis `x` or `y` the scale of the square root, from 0 to a little above the highest value."""
    getattr(axes, f"set_{which}scale")("function", functions=(lambda x: np.sqrt(np.clip(x, 0, None)), np.square))
    getattr(axes, f"set_{which}lim")(0, highest * 1.1)
    getattr(axes, f"set_{which}ticks")(_ticks(highest))
    getattr(axes, f"{which}axis").set_major_formatter("{x:g}")


def _points(axes: Any, rows: Sequence[Mapping[str, Any]], **style: Any) -> None:
    rows = sorted(rows, key=_kl)
    axes.errorbar(
        [_kl(row) for row in rows],
        [row["pass@1"] for row in rows],
        xerr=[_stderr(row, "kl_per_token") for row in rows],
        yerr=[_stderr(row, "pass@1") for row in rows],
        markersize=5,
        linewidth=1.2,
        elinewidth=0.8,
        clip_on=False,
        **style,
    )


def _kl(row: Mapping[str, Any]) -> float:
    """KL per token; rounding may leave that of the base policy to itself below zero."""
    return max(float(row["kl_per_token"]), 0.0)


def _stderr(row: Mapping[str, Any], name: str) -> float:
    """Standard error, or 0 where it is unknown, as with a single prompt."""
    value = float(row[f"{name}_stderr"])
    return value if math.isfinite(value) else 0.0


def _ticks(highest: float) -> list[float]:
    """Squares of the multiples of 1, 2 or 5 times a power of ten, some six of them up to the highest value."""
    root = math.sqrt(highest)
    decade = 10.0 ** math.floor(math.log10(root / 6))
    step = next(factor * decade for factor in (1, 2, 5, 10) if root / (factor * decade) <= 7)
    return [(i * step) ** 2 for i in range(int(root / step) + 1)]
