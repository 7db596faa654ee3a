"""The drawing of a preview: what is on it, and that no measurement breaks it."""

import math
from itertools import pairwise
from typing import Any

import matplotlib.axes
import pytest

from erpd_lightning.report.drawing import draw_preview


def measured(pass_at_1: float, kl: float, stderr: float = 0.01) -> dict[str, float]:
    return {"pass@1": pass_at_1, "pass@1_stderr": stderr, "kl_per_token": kl, "kl_per_token_stderr": stderr / 10}


TARGETS = [measured(0.66, 0.1), measured(0.6, 0.02), measured(0.67, 0.05)]
POLICIES = {"base": measured(0.38, -1e-9), "teacher": measured(0.4, 0.4), "student": measured(0.65, 0.05)}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is drawn, by its label in the legend, and the axes."""
    series: dict[str, Any] = {}
    errorbar = matplotlib.axes.Axes.errorbar

    def watched(axes: Any, x: Any, y: Any, **style: Any) -> Any:
        series["axes"] = axes
        series[style["label"]] = (list(x), list(y), list(style["xerr"]), list(style["yerr"]))
        return errorbar(axes, x, y, **style)

    monkeypatch.setattr(matplotlib.axes.Axes, "errorbar", watched)
    return series


def test_points_and_standard_errors(drawn: dict[str, Any]) -> None:
    assert draw_preview(TARGETS, POLICIES, "Round 1").startswith(b"\x89PNG")
    axes = drawn.pop("axes")
    assert drawn == {
        "target": ([0.02, 0.05, 0.1], [0.6, 0.67, 0.66], [0.001] * 3, [0.01] * 3),
        "base": ([0.0], [0.38], [0.001], [0.01]),
        "teacher": ([0.4], [0.4], [0.001], [0.01]),
        "student": ([0.05], [0.65], [0.001], [0.01]),
    }
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["target", "base", "teacher", "student"]
    assert list(axes.get_xticks()) == pytest.approx([0, 0.01, 0.04, 0.09, 0.16, 0.25, 0.36])
    assert "nats per token" in axes.get_xlabel()
    assert axes.get_ylabel() == "pass@1"


@pytest.mark.parametrize("kl", [0.0, 1e-7, 0.003, 0.2, 9.0, 300.0])
def test_ticks_lie_apart(drawn: dict[str, Any], kl: float) -> None:
    draw_preview([measured(0.5, kl, stderr=0.0)], {}, "Round 1")
    ticks = drawn["axes"].get_xticks()
    assert 4 <= len(ticks) <= 8
    roots = [math.sqrt(tick) for tick in ticks]
    steps = [b - a for a, b in pairwise(roots)]
    assert steps == pytest.approx([roots[1]] * len(steps))


def test_a_single_prompt_has_no_error_bars(drawn: dict[str, Any]) -> None:
    draw_preview([measured(0.5, 0.1, stderr=math.nan)], {}, "Round 1")
    assert drawn["target"] == ([0.1], [0.5], [0.0], [0.0])
