"""Signals that end a run, in real processes: an exit code, one line, and the same end when it is started again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.chain import arguments
from support.command_line import STAGES, Run, student
from support.processes import ENVIRONMENT, ROOT, children


def stopped(
    argv: list[str], number: signal.Signals, when: Callable[[], bool], to_child: bool = False
) -> tuple[int, list[str]]:
    """Exit code and lines on stderr of a run that gets a signal, or whose child does, once something is so."""
    command = [sys.executable, "-m", "erpd_lightning", *argv]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not when():
        time.sleep(0.01)
    started = children(process.pid)
    os.kill(started[0] if to_child else process.pid, number)
    _, printed = process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in started) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{child}").exists() for child in started)
    return process.returncode, printed.strip().splitlines()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_training(
    number: signal.Signals, code: int, copy: Callable[..., Path], run: Run, finished: tuple[Path, str]
) -> None:
    run_dir = copy(*STAGES[2:])
    folder = run_dir / "round-1" / "extreme_region"
    ended, lines = stopped(arguments(run_dir), number, lambda: any(folder.glob("checkpoints/step=*.ckpt")))
    assert (ended, lines) == (code, [f"stopped by {number.name}: the same command goes on from here"])
    run(*arguments(run_dir))
    assert student(run_dir) == student(finished[0])


@pytest.mark.parametrize("to_child", [False, True])
def test_a_signal_to_one_process_of_two(to_child: bool, copy: Callable[..., Path]) -> None:
    run_dir = copy(*STAGES[2:])
    folder = run_dir / "round-1" / "extreme_region"
    argv = [*arguments(run_dir), "--trainer.devices=2", "--trainer.strategy=ddp", "--stage=extreme_region"]
    ended, lines = stopped(argv, signal.SIGTERM, lambda: any(folder.glob("checkpoints/step=*.ckpt")), to_child)
    assert (ended, lines[-1:]) == (143, ["stopped by SIGTERM: the same command goes on from here"]), lines
    assert "Traceback" not in "".join(lines)


@pytest.mark.parametrize(
    ("name", "value"), [("SLURM_NTASKS", "two"), ("RANK", "x"), ("WORLD_SIZE", "0"), ("LOCAL_RANK", "-1")]
)
def test_variables_that_make_no_sense(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, refused: Run, tmp_path: Path
) -> None:
    monkeypatch.setenv(name, value)
    assert refused(*arguments(tmp_path / "run")).startswith(f"the environment variable {name} is '{value}'")


def test_a_rank_beyond_the_world(monkeypatch: pytest.MonkeyPatch, refused: Run, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused(*arguments(tmp_path / "run")).startswith("the environment variable RANK is 2, but WORLD_SIZE is 2")


def test_a_mistake_is_told_once_by_two_processes(copy: Callable[..., Path]) -> None:
    run_dir = copy(*STAGES[2:])
    wild = ["--extreme_region.learning_rate=1e30", "--stage=extreme_region"]
    argv = [*arguments(run_dir), "--trainer.devices=2", "--trainer.strategy=ddp", *wild]
    command = [sys.executable, "-m", "erpd_lightning", *argv]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, len(told)) == (2, 1), done.stderr
