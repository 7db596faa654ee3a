"""`validate`, `test` and `predict`: what they do with the policy of a stage."""

import json
import re
from pathlib import Path

import pytest

from support.chain import arguments
from support.command_line import Run


@pytest.mark.parametrize("stage", ["distill", "extreme_region"])
@pytest.mark.parametrize("command", ["validate", "test"])
def test_validate_and_test_measure_the_policy_of_a_stage(
    finished: tuple[Path, str], run: Run, command: str, stage: str
) -> None:
    out = run(*arguments(finished[0], command), f"--stage={stage}")
    prefix = {"validate": "val", "test": "test"}[command]
    for name in ("pass@1", "kl_per_token", "entropy_per_token"):
        assert re.search(rf"{prefix}/{name}[ │]+\d", out), out


def test_predict_writes_checked_responses(finished: tuple[Path, str], run: Run) -> None:
    written = {}
    for stage, policy in (("distill", "student"), ("extreme_region", "teacher"), ("base", "base")):
        path = finished[0] / "round-1" / f"predictions-{policy}.jsonl"
        out = run(*arguments(finished[0], "predict"), f"--stage={stage}")
        assert out.splitlines()[-1] == f"16 responses lie in {path}"
        written[policy] = rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == 16
        for row in rows:
            assert set(row) == {"prompt", "response", "answer", "reward", "finish_reason"}
            found = re.search(r"=\s*(-?\d+)\s*$", row["response"])
            assert row["reward"] == float(found is not None and found[1] == row["answer"])
        path.unlink()
    assert written["student"] != written["base"]


def test_a_checkpoint_of_a_stage_can_be_validated(
    finished: tuple[Path, str], run: Run, refused: Run, tmp_path: Path
) -> None:
    folder = finished[0] / "round-1" / "extreme_region" / "checkpoints"
    args = [*arguments(finished[0], "validate"), "--stage=extreme_region", "--ckpt_path"]
    checkpoint = next(folder.glob("*.ckpt"))
    assert "val/pass@1" in run(*args, checkpoint)
    damaged = tmp_path / "half.ckpt"
    damaged.write_bytes(checkpoint.read_bytes()[:-100])
    for path in (damaged, tmp_path / "none.ckpt"):
        assert refused(*args, path).startswith(f"ckpt_path {path} is missing or damaged")
    of_a_student = [*arguments(finished[0], "validate"), "--ckpt_path", str(checkpoint)]
    assert refused(*of_a_student) == "the checkpoint is not one of a distillation: it holds no KL budget"


def test_a_policy_that_is_not_there_yet(refused: Run, tmp_path: Path) -> None:
    message = refused(*arguments(tmp_path, "validate"))
    assert message == (
        f"{tmp_path / 'round-1' / 'distill' / 'student'} is missing: fit makes it, in the stage distill of round 1"
    )
    message = refused(*arguments(tmp_path, "predict"), "--stage=scoring")
    assert message == "stage is 'scoring': predict takes one of base, extreme_region, unlearned, distill"
