"""Plots of the report: what is drawn of runs and of rounds."""

from pathlib import Path
from typing import Any

import matplotlib.axes
import pytest

from erpd_lightning.report.plots import DARK, LIGHT, accuracy_of_round, accuracy_of_runs
from erpd_lightning.report.read import read_run, read_runs
from support.made_run import make_run, skip_painting


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_painting(monkeypatch)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, undrawn: None) -> dict[str, Any]:
    """What is drawn with error bars, by its label."""
    series: dict[str, Any] = {}
    errorbar = matplotlib.axes.Axes.errorbar

    def watched(axes: Any, x: Any, y: Any, **style: Any) -> Any:
        series[style.get("label") or ""] = (list(x), list(y))
        return errorbar(axes, x, y, **style)

    monkeypatch.setattr(matplotlib.axes.Axes, "errorbar", watched)
    return series


def test_each_run_is_a_series(tmp_path: Path, drawn: dict[str, Any]) -> None:
    first = make_run(tmp_path / "ours", rounds=2)
    second = make_run(tmp_path / "_theirs$", policies=("base", "student"))
    accuracy_of_runs(read_runs([first, second]), LIGHT)
    assert drawn["ours"] == ([0.0, 0.1, 0.1], pytest.approx([0.25, 0.65, 0.7]))
    assert drawn[r" _theirs\$"] == ([0.0, 0.1], pytest.approx([0.25, 0.65]))
    assert drawn["teacher"] == ([0.8], pytest.approx([0.45]))
    assert {name for name in drawn if name} == {"ours", r" _theirs\$", "teacher", "unlearned"}


def test_a_round_shows_the_teacher_along_its_epochs(
    tmp_path: Path, drawn: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[Any] = []
    plot = matplotlib.axes.Axes.plot

    def watched(axes: Any, x: Any, y: Any, **style: Any) -> Any:
        lines.append((list(x), list(y), style.get("color")))
        return plot(axes, x, y, **style)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", watched)
    accuracy_of_round(read_run(make_run(tmp_path / "run"), "it").rounds[0], DARK)
    assert lines[0] == ([0.0, 0.1, 0.2], [0.25, 0.5, 0.4], DARK.policies["teacher"])
    assert drawn["student"] == ([0.05], pytest.approx([0.65]))
    assert list(drawn) == ["base", "teacher", "unlearned", "student"]
