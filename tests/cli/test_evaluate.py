"""`evaluate`: any policy, without a run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.chain import arguments
from support.command_line import Run, digests
from support.policies import write_prompts


@pytest.fixture
def own_sets(tmp_path: Path) -> str:
    prompts = write_prompts(tmp_path / "set.jsonl", [("1+2:", "3"), ("2+2:", "4"), ("4-1:", "3")])
    return f"--evaluation.sets={json.dumps({'mine': {'prompts': str(prompts), 'samples': 4, 'top_p': 0.9}})}"


def test_the_policies_of_a_run(
    finished: tuple[Path, str], run: Run, tmp_path: Path, own_sets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its own evaluation has measured them: with the same seed the same draws."""
    monkeypatch.chdir(tmp_path)
    run_dir, output = finished[0], tmp_path / "out" / "measured.json"
    before = digests(run_dir)
    args = arguments(run_dir, "evaluate")
    policy, base = run_dir / "round-1" / "distill" / "student", run_dir / "base"
    out = run(*args, f"--policy={policy}", f"--reference={base}", f"--output={output}", own_sets)
    measured = json.loads(output.read_text())
    recorded = json.loads((run_dir / "round-1" / "evaluation" / "student" / "stage.json").read_text())
    assert measured["fingerprint"] == recorded["inputs"]["student"]
    expected = {name: value for name, value in recorded["outcome"].items() if "_to_first" not in name}
    assert measured["held_out"] == {**expected, "temperature": 1.0}
    (row,) = measured["evaluation_sets"].values()
    assert (row["prompts"], row["samples_per_prompt"], row["top_p"]) == (3, 4, 0.9)
    assert "entropy_per_token" not in row
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines[4:6]] == [["held_out", "student"], ["mine", "student"]]
    assert f"KL to {base} {expected['kl_per_token']:.4f} ± " in lines[6]
    assert lines[-1] == f"What was measured lies in {output}"
    assert digests(run_dir) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "set.jsonl"]


def test_without_a_reference_no_kl_is_told(
    finished: tuple[Path, str], run: Run, tmp_path: Path, own_sets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a policy of no run, with nothing but what is given."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished[0] / "base", tmp_path / "copy")
    out = run("evaluate", "--policy=copy", own_sets, "--data.sampler.max_new_tokens=8", "--output=measured.json")
    measured = json.loads(Path("measured.json").read_text())
    assert "held_out" not in measured
    assert "held_out" not in out
    out = run("evaluate", "--policy=copy", "--data.validation_prompts=set.jsonl", "--data.sampler.max_new_tokens=8")
    assert "KL not measured, which takes --reference" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "measured.json", "set.jsonl"]


def test_mistakes(finished: tuple[Path, str], refused: Run, tmp_path: Path, own_sets: str) -> None:
    base = f"--policy={finished[0] / 'base'}"
    assert refused("evaluate").startswith("policy is missing: evaluate takes --policy")
    assert refused("evaluate", "--policy=/none") == "policy /none is missing: a Hugging Face folder is expected there"
    message = refused("evaluate", base, "--reference=./none", own_sets)
    assert message == "reference ./none is missing: a Hugging Face folder is expected there"
    assert "there is nothing to evaluate on" in refused("evaluate", base)
    fits = "--data.sampler.max_new_tokens=8"
    message = refused("evaluate", base, own_sets, fits, f"--output={tmp_path}")
    assert message == f"output {tmp_path} is a folder: the name of a file is expected"
    message = refused("evaluate", base, own_sets)
    assert message.startswith("evaluation.sets.mine.max_new_tokens is 256: with the 4 tokens of ")
    assert refused("evaluate", base, fits, "--data.validation_prompts=none.jsonl").startswith("none.jsonl is missing")


def test_a_policy_that_its_run_did_not_record(copy: Callable[..., Path], refused: Run, own_sets: str) -> None:
    policy = copy() / "round-1" / "distill" / "student"
    weights: Any = next(policy.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    message = refused("evaluate", f"--policy={policy}", own_sets, "--data.sampler.max_new_tokens=8")
    assert message.startswith(f"{policy} was altered or truncated")


def test_a_base_policy_that_is_given_can_be_tested(finished: tuple[Path, str], run: Run, own_policy: Any) -> None:
    args = own_policy('{"prompt": "1+1:", "answer": 2}\n')[1:]
    out = run("test", *args, "--stage=base")
    assert "test/pass@1" in out
    assert "test/kl_per_token" in out
