"""Stages that are run by themselves."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.chain import arguments
from support.command_line import STAGES, Run, student, with_yaml


def test_stages_one_by_one_make_the_same_student(
    finished: tuple[Path, str], run: Run, refused: Run, tmp_path: Path
) -> None:
    watched = f"""
distill_trainer:
  max_epochs: 2
  callbacks:
  - class_path: erpd_lightning.callbacks.Throughput
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {{save_dir: {tmp_path / "tensorboard"}}}
"""
    args = with_yaml(tmp_path, watched)
    folder = tmp_path / "run" / "round-1"
    assert "needs the stage base in" in refused(*args, "--stage=scoring")
    run(*args, "--stage=base")
    assert "[base] base: done already" in run(*args, "--stage=base")
    assert "needs the stage rollouts in" in refused(*args, "--stage=extreme_region")
    for stage, following in zip(STAGES[1:], [*STAGES[2:], None], strict=True):
        assert not (folder / stage / "stage.json").exists()
        out = run(*args, f"--stage={stage}")
        assert f"[round 1/1] {stage}: " in out
        again = run(*args, f"--stage={stage}")
        assert f"[round 1/1] {stage}: done already\n" in again
        if following is not None:
            assert (
                f"--stage {stage} is finished; what comes next is the stage {following} in {folder / following}"
                in again
            )
    assert student(tmp_path / "run") == student(finished[0])
    summaries = [json.loads((path / "summary.json").read_text()) for path in (tmp_path / "run", finished[0])]
    assert summaries[0]["rounds"][0]["policies"] == summaries[1]["rounds"][0]["policies"]
    # The logger and the callback of one stage were that stage's alone.
    assert len(list((tmp_path / "tensorboard").rglob("events.out.*"))) == 1
    assert not (folder / "distill" / "metrics").exists()
    metrics = next((folder / "extreme_region" / "metrics").rglob("metrics.csv")).read_text()
    assert "throughput/tokens_per_second" not in metrics
    events = next((tmp_path / "tensorboard").rglob("events.out.*")).read_bytes()
    assert b"throughput/tokens_per_second" in events


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--stage=foo", "stage is 'foo': it must be one of base, rollouts"),
        ("--round=9", "round is 9: it must lie between 1 and rounds (1)"),
        ("--rounds=0", "rounds (0)"),
        ("--checkpoint_every=0", "checkpoint_every (0)"),
    ],
)
def test_a_stage_or_round_out_of_range(refused: Run, tmp_path: Path, given: str, expected: str) -> None:
    assert expected in refused(*arguments(tmp_path), given)


def test_stages_that_the_run_does_not_have(refused: Run, tmp_path: Path, own_policy: Any) -> None:
    signal = '--distill.signal.terms=[{"numerator": "teacher", "denominator": "base"}]'
    message = refused(*arguments(tmp_path), signal, "--stage=unlearned")
    assert message == "stage is 'unlearned', but distill.signal uses no unlearned policy"
    assert refused(*own_policy("", None), "--stage=base").startswith("stage is 'base', but policy gives")
