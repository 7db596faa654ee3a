"""Run directories as they are read: records, logs, and the names of runs and policies."""

import json
from pathlib import Path

import pytest

from erpd_lightning.report.read import read_log, read_run, run_names
from support.made_run import make_run, measured, write_log, write_stage


def test_names_are_as_short_as_they_can_be() -> None:
    assert run_names([Path("/a/erpd/seed-0"), Path("/a/grpo/seed-0")]) == ["erpd/seed-0", "grpo/seed-0"]
    assert run_names([Path("/a/erpd/seed-0")]) == ["seed-0"]


def test_a_run_is_read(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", rounds=2), "it")
    assert (run.name, run.seed, run.planned_rounds, [entry.number for entry in run.rounds]) == ("it", 7, 2, [1, 2])
    last = run.rounds[1]
    assert list(last.policies) == ["base", "teacher", "unlearned", "student"]
    assert last.policies["student"]["pass@1"] == pytest.approx(0.7)
    assert (last.budget, last.rollouts, last.base) == (0.05, 800, "b" * 64)
    assert last.seconds == 20.0  # as the summary says
    assert list(last.logs) == ["teacher", "unlearned", "student"]
    assert last.logs["teacher"]["val/kl_per_token"] == {1: 0.1, 2: 0.2}


def test_records_tell_what_the_summary_does_not_yet(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", rounds=2)
    whole = read_run(path, "it")
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps({"rounds": summary["rounds"][:1]}))
    found = read_run(path, "it")
    assert found.rounds[0] == whole.rounds[0]
    assert found.rounds[1].seconds == 8 * 2.5
    for name in ("policies", "budget", "rollouts", "logs", "samples"):
        assert getattr(found.rounds[1], name) == getattr(whole.rounds[1], name), name


def test_responses_of_the_signal_selection_count_as_rollouts(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    write_stage(path / "round-1" / "signal_selection", "signal_selection", 1, {"rollouts": 50})
    (path / "summary.json").unlink()
    assert read_run(path, "it").rounds[0].rollouts == 850


def test_further_teachers_come_before_the_student(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    folder = path / "round-1"
    write_stage(folder / "evaluation" / "squared", "evaluation", 1, measured(0.3, 0.2))
    write_stage(folder / "teachers" / "squared", "teachers.squared", 1, {})
    write_log(folder / "teachers" / "squared")
    (path / "summary.json").unlink()
    (entry,) = read_run(path, "it").rounds
    assert list(entry.policies) == ["base", "teacher", "unlearned", "squared", "student"]
    assert list(entry.logs) == ["teacher", "unlearned", "squared", "student"]


def test_a_method_of_one_stage_trains_the_student(tmp_path: Path) -> None:
    (entry,) = read_run(make_run(tmp_path / "run", policies=("base", "student")), "it").rounds
    assert list(entry.logs) == ["student"]
    assert entry.budget is None


def test_a_resumed_stage_counts_each_step_once(tmp_path: Path) -> None:
    """The later attempt wins where both logged a step; `version_10` is later than `version_9`."""
    header = "epoch,step,train/loss,val/pass@1"
    write_log(tmp_path, [(0, 0, 10.0, ""), (0, 1, 11.0, ""), (0, 1, "", 0.1), (0, 2, 12.0, "")], 0, header)
    write_log(tmp_path, [(0, 3, 33.0, ""), (0, 2, 32.0, "")], 10, header)
    write_log(tmp_path, [(0, 1, 21.0, ""), (0, 2, 22.0, ""), (0, 3, 23.0, "")], 9, "epoch,step,train/loss,val/other")
    log = read_log(tmp_path)
    assert list(log["train/loss"].items()) == [(0, 10.0), (1, 21.0), (2, 32.0), (3, 33.0)]
    assert log["val/pass@1"] == {1: 0.1}
    assert "val/other" not in log
    assert "epoch" not in log


def test_a_log_that_has_only_begun_is_empty(tmp_path: Path) -> None:
    write_log(tmp_path).write_text("")
    assert read_log(tmp_path) == {}
