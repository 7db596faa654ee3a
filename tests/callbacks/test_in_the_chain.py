"""Callbacks in the chain of stages: what they do goes to the summary, and is part of what a stage was made with."""

import json
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from erpd_lightning.cli.main import main
from erpd_lightning.pipeline.records import round_summary
from support.chain import arguments, parsers_built_once
from support.command_line import printed, refusal

# CollapseMonitor

CALLBACKS = """
trainer:
  callbacks:
  - class_path: erpd_lightning.callbacks.CollapseMonitor
    init_args:
      every_n_steps: 2
      interval: [0.5, 2.0]
      limits:
        collapse/entropy: {max: 0.001}
  - class_path: erpd_lightning.callbacks.SampleTable
    init_args: {every_n_validations: 1}
distill_trainer:
  callbacks:
  - class_path: erpd_lightning.callbacks.CollapseMonitor
    init_args:
      limits:
        val/entropy_per_token: {max: 0.001}
  - class_path: erpd_lightning.callbacks.SampleTable
"""


def run_chain(monkeypatch: pytest.MonkeyPatch, run_dir: Path, *configs: Path) -> dict[str, Any]:
    """What `summary.json` says of the one round."""
    command, config, *others = arguments(run_dir)
    given = [f"--config={path}" for path in configs]
    monkeypatch.setattr("sys.argv", ["erpd_lightning", command, config, *given, *others])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
    (summary,) = json.loads((run_dir / "summary.json").read_text())["rounds"]
    return summary


def test_what_was_crossed_goes_to_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "watch.yaml").write_text(CALLBACKS)
    with parsers_built_once():
        summary = run_chain(monkeypatch, tmp_path / "run", tmp_path / "watch.yaml")
        unmonitored = run_chain(monkeypatch, tmp_path / "unmonitored")
    folder = tmp_path / "run" / "round-1"
    stages = [warning.partition(":")[0] for warning in summary["warnings"]]
    assert stages == ["extreme_region", "unlearned", "distill"]
    assert all("optimiser step 2: collapse/entropy is" in warning for warning in summary["warnings"][:2])
    assert "val/entropy_per_token is" in summary["warnings"][2]
    record = json.loads((folder / "extreme_region" / "stage.json").read_text())
    assert summary["warnings"][0] == f"extreme_region: {record['outcome']['warnings'][0]}"
    assert round_summary(folder, 1, summary["policies"]) == {
        key: value for key, value in summary.items() if key != "rollouts_total"
    }
    assert unmonitored["warnings"] == []
    assert unmonitored["policies"] == summary["policies"]  # To the last bit: the monitor changes nothing.
    del record["outcome"]["warnings"], record["sha256"]
    (folder / "extreme_region" / "stage.json").write_text(json.dumps(record))
    assert len(round_summary(folder, 1, summary["policies"])["warnings"]) == 2  # of a run made before there were any


def test_a_limit_that_is_refused_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = {
        "class_path": "erpd_lightning.callbacks.CollapseMonitor",
        "init_args": {"limits": {"collapse/essence": {"max": 1.0}}},
    }
    option = f"--trainer.callbacks={json.dumps(callback)}"
    with parsers_built_once():
        line = refusal(capsys, partial(printed, capsys), *arguments(tmp_path), option)
    assert line.startswith("trainer.callbacks: limits: 'collapse/essence' is not monitored")


# KLBudget


def test_a_student_that_overran_does_not_leave_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its callbacks did is part of what a stage was made with."""

    def run(action: str) -> int:
        callback = {"class_path": "erpd_lightning.callbacks.KLBudget", "init_args": {"budget": 0.002, "action": action}}
        own = json.dumps({"max_epochs": 2, "callbacks": [callback]})
        argv = arguments(tmp_path / "run", **{"distill.calibrate": False, "distill.kl_budget": 0.05})
        argv = [argument for argument in argv if not argument.startswith("--distill_trainer")]
        monkeypatch.setattr("sys.argv", ["erpd_lightning", *argv, f"--distill_trainer={own}"])
        try:
            main()
        except SystemExit as error:
            return int(str(error.code))
        return 0

    distill = tmp_path / "run" / "round-1" / "distill"
    assert run("stop") == 2
    assert "error: KLBudget: training ended outside its budget: KL 0." in capsys.readouterr().err
    assert not (distill / "student").exists()
    assert run("search") == 2
    assert "was made with distill_trainer.callbacks" in capsys.readouterr().err
    shutil.rmtree(distill)
    assert run("search") == 0
    (entry,) = json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"]
    student = entry["policies"]["student"]
    assert student["kl_per_token"] <= 0.002 + 3 * student["kl_per_token_stderr"]
