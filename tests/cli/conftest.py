"""The command line in this process, and one small run that all tests share.

The run is a process of its own; most tests call `main` in this process, because importing takes longer than the test.
A mistake has to end in exit code 2 and a line or two: any other exception leaves `main` and fails the test.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from erpd_lightning.pipeline.rounds import Rounds
from support.chain import arguments, parsers_built_once
from support.command_line import Run, printed, refusal
from support.processes import ROOT


@pytest.fixture(autouse=True, scope="package")
def _parsers_are_built_once() -> Iterator[None]:
    with parsers_built_once():
        yield


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls `main` with arguments and returns what it printed."""
    return partial(printed, capsys)


@pytest.fixture
def refused(run: Run, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls `main` with arguments that hold a mistake, and returns its one line about it."""
    return partial(refusal, capsys, run)


@pytest.fixture
def shown(run: Run, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls `main` with `--help` or `--print_config`, and returns what is shown."""

    def call(*args: object) -> str:
        with pytest.raises(SystemExit) as ended:
            run(*args)
        captured = capsys.readouterr()
        assert ended.value.code == 0, captured.err
        return captured.out

    return call


@pytest.fixture
def chain(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rounds]:
    """What `fit` would run, with all that was configured."""

    def call(*args: object) -> Rounds:
        found: list[Rounds] = []
        with monkeypatch.context() as patch:
            patch.setattr(Rounds, "run", lambda self: found.append(self))
            run(*args)
        return found[0]

    return call


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run, and what it printed."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    command = [sys.executable, "-m", "erpd_lightning", *arguments(run_dir)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return run_dir, result.stdout


@pytest.fixture
def copy(finished: tuple[Path, str], tmp_path: Path) -> Callable[..., Path]:
    """A copy of the finished run without some stages of its round."""

    def call(*without: str) -> Path:
        run_dir = tmp_path / "run"
        shutil.copytree(finished[0], run_dir)
        for stage in without:
            shutil.rmtree(run_dir / "round-1" / stage)
        return run_dir

    return call


@pytest.fixture
def own_policy(finished: tuple[Path, str], tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a run on prompts of one's own instead of the task's."""

    def call(prompts: str | None, validation: str | None = '{"prompt": "1+1:", "answer": 2}\n') -> list[str]:
        overrides: dict[str, Any] = {"data.prompts_per_round": "null"}
        for key, text in (("prompts", prompts), ("validation_prompts", validation)):
            overrides[f"data.{key}"] = tmp_path / f"{key}.jsonl"
            if text is not None:
                overrides[f"data.{key}"].write_text(text)
        given = arguments(tmp_path / "run", **overrides)
        kept = [argument for argument in given if not argument.startswith("--task")]
        return [*kept, "--task=null", f"--policy={finished[0] / 'base'}"]

    return call
