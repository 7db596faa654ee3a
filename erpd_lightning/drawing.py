"""Drawings of what was measured; needs matplotlib, the extra `report`."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Policies and targets in colours that are told apart without seeing red and green.
TARGET, POLICY = "#0072b2", "#444444"


def draw_preview(
    previews: Sequence[Mapping[str, Any]], policies: Mapping[str, Mapping[str, Any]], title: str
) -> bytes:
    """Accuracy against KL to the base policy, with standard errors, as a PNG.

    KL is drawn on the scale of its square root, on which small budgets and a policy far away are seen together.

    Args:
        previews: What targets showed, by the keys of `preview.json`; a line joins them.
        policies: What policies showed, by the keys of `summary.json`, as points with their names.
        title: What stands above.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # Without pyplot: no display and no global state.

    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    _points(axes, previews, color=TARGET, marker="o", linestyle="-")
    last = max(previews, key=lambda row: float(row["kl_per_token"]))
    _label(axes, "target", last, TARGET, above=True)
    for name, row in policies.items():
        _points(axes, [row], color=POLICY, marker="s", linestyle="none")
        _label(axes, name, row, POLICY, above=False)
    highest = max(_kl(row) + _stderr(row, "kl_per_token") for row in [*previews, *policies.values()])
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.clip(x, 0, None)), np.square))
    axes.set_xlim(-0.0, highest * 1.15)
    axes.set_xticks(_ticks(highest * 1.15))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("KL to the base policy (nats per token, square-root scale)")
    axes.set_ylabel("pass@1")
    axes.set_title(title, loc="left")
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


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


def _label(axes: Any, text: str, row: Mapping[str, Any], color: str, above: bool) -> None:
    axes.annotate(
        text,
        (_kl(row), row["pass@1"]),
        xytext=(6, 6 if above else -6),
        textcoords="offset points",
        va="bottom" if above else "top",
        color=color,
    )


def _kl(row: Mapping[str, Any]) -> float:
    """The KL per token; rounding may leave that of the base policy to itself below zero."""
    return max(float(row["kl_per_token"]), 0.0)


def _stderr(row: Mapping[str, Any], name: str) -> float:
    """A standard error; a single prompt has none."""
    value = float(row[f"{name}_stderr"])
    return value if math.isfinite(value) else 0.0


def _ticks(highest: float) -> list[float]:
    """0, and 1, 2, 5 times powers of ten over two decades below the highest value."""
    decade = math.floor(math.log10(highest)) if highest > 0 else 0
    steps = [factor * 10.0**power for power in range(decade - 1, decade + 1) for factor in (1, 2, 5)]
    return [0.0, *(step for step in steps if step <= highest)]
