"""The command `rollouts`: audits, imports, and one line for each mistake."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from erpd_lightning.__main__ import main
from erpd_lightning.data.store import Store
from support.command_line import refusal
from support.policies import make_rows, save_policy, write_rollouts

Command = Callable[..., str]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Calls `rollouts` with arguments and returns what it printed."""

    def call(*args: object) -> str:
        monkeypatch.setattr(sys, "argv", ["erpd_lightning", "rollouts", *map(str, args)])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def refused(command: Command, capsys: pytest.CaptureFixture[str]) -> Command:
    """Calls it with a mistake, and returns its one line about it."""
    return partial(refusal, capsys, command)


def test_an_audit_of_a_store(command: Command, tmp_path: Path) -> None:
    store = write_rollouts(tmp_path / "store", make_rows(groups=2)).path
    shown = command("audit", store)
    assert shown.startswith(".: 8 responses: 37.5% correct, 0.0% truncated, 0.0% unscorable; 2 of 2 groups mixed\n")
    for heading in ("duplicate", "longest", "mean reward", "prompts"):
        assert heading in shown
    assert "0.0% correct" in command("audit", store, "--correct_threshold=1.5")


def test_an_audit_of_a_run(command: Command, finished: tuple[Path, str]) -> None:
    found = json.loads(command("audit", finished[0], "--json"))
    record = json.loads((finished[0] / "round-1" / "rollouts" / "stage.json").read_text())["outcome"]
    assert found == {"round-1/rollouts": {**record["audit"], "optimizer_steps": record["optimizer_steps"]}}
    assert record["optimizer_steps"] >= 1
    summary = json.loads((finished[0] / "summary.json").read_text())["rounds"][0]["sampled"]
    assert summary["mixed_groups"] == record["audit"]["mixed_groups"]
    assert f"; {record['optimizer_steps']} optimiser step" in command("audit", finished[0]).splitlines()[0]
    assert f"{record['rollouts']} responses: " in finished[1]


def test_an_import(command: Command, tmp_path: Path) -> None:
    policy, source = save_policy(tmp_path / "base"), tmp_path / "responses.jsonl"
    row = {"prompt": "1+1:", "completion": ["1+1=2", "1+1=3"], "answer": 2, "score": [0, 0]}
    source.write_text(json.dumps(row) + "\n")
    args = ["import", source, "--policy", policy, "--response_column=completion", "--reward_column=score"]
    shown = command(*args, "--output", tmp_path / "verified", "--verifier=ExactMatch", "--temperature=0.7")
    assert "recorded scores and verifier disagree on 1 of 2 responses" in shown
    table = Store.open(tmp_path / "verified").table()
    assert table["reward"].to_pylist() == [1, 0]
    assert table["temperature"].to_pylist() == [0.7, 0.7]
    assert "disagree" not in command(*args, "--output", tmp_path / "recorded")
    assert Store.open(tmp_path / "recorded").table()["reward"].to_pylist() == [0, 0]


def test_verdicts_of_another_verifier(command: Command, tmp_path: Path) -> None:
    rows = [{**row, "answer": "42", "response": "41", "reward": 1.0} for row in make_rows(groups=1, group_size=3)]
    store = write_rollouts(tmp_path / "store", rows).path
    again = ["verify", store, "--verifier=ExactMatch", "--output", tmp_path / "again"]
    shown = command(*again, "--show=2")
    assert shown.startswith(
        f"3 of 3 verdicts changed: 3 lower; the rollouts with their new verdicts lie in {again[-1]}\n"
    )
    assert shown.count("1 -> 0  answer 42") == 2
    assert Store.open(tmp_path / "again").table()["reward"].to_pylist() == [0, 0, 0]
    assert Store.open(store).table()["reward"].to_pylist() == [1, 1, 1]


def test_verdicts_of_another_verifier_on_a_run(command: Command, finished: tuple[Path, str], tmp_path: Path) -> None:
    assert "responses" in finished[1]
    shown = command("verify", finished[0], "--verifier=MathVerify", "--output", tmp_path / "again")
    assert "verdicts changed" in shown
    assert Store.exists(tmp_path / "again" / "round-1" / "rollouts")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["verify", "{tmp}", "--verifier=ExactMatch", "--output={tmp}/x"], "is neither a finished rollout store"),
        (["verify", "{tmp}", "--output={tmp}/x"], "verifier"),
        ([], "rollouts is followed by nothing: one of audit, import, verify is expected"),
        (["audits"], "rollouts is followed by audits: one of audit, import, verify is expected"),
        (["audit", "/nowhere"], "/nowhere is neither a finished rollout store nor a run directory with one"),
        (["import", "/nowhere.jsonl", "--policy={policy}", "--output=x"], "/nowhere.jsonl is missing: "),
        (["import", "{rows}", "--policy=/nowhere", "--output={tmp}/x"], " can be loaded from /nowhere"),
        (["import", "{rows}", "--policy={policy}", "--output={tmp}/x", "--answer_column=a"], "has no column 'a'"),
        (["import", "{rows}", "--policy={policy}", "--output={tmp}/x", "--rescore=so"], "rescore"),
        (["import", "{rows}", "--policy={policy}", "--output={tmp}/x", "--verifier=No"], "verifier"),
        (["import", "{rows}", "--policy={policy}"], "output"),
        (["audit", "{tmp}", "--jsn"], "jsn"),
    ],
)
def test_a_mistake_is_told_in_a_line(refused: Command, tmp_path: Path, args: list[str], message: str) -> None:
    policy = save_policy(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1:", "response": "2", "reward": 1}\n')
    given = [arg.format(policy=policy, rows=rows, tmp=tmp_path) for arg in args]
    assert message in refused(*given)


def test_help(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert "{audit,import,verify}" in command("--help")
    with pytest.raises(SystemExit) as ended:
        command("import", "--help")
    assert ended.value.code == 0
    assert "--response_column" in capsys.readouterr().out
