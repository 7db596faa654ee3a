"""Signals that end a run, in real processes: an exit code, one line, and the same end when it is started again."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from support.chain import arguments
from support.command_line import STAGES, Run, student
from support.processes import ENVIRONMENT, ROOT, children, free_port

STOPPED = "stopped by {}: the same command goes on from here"
IGNORED = "SIGUSR1 is ignored: a run is not requeued yet"


def start(argv: list[str], environment: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "erpd_lightning", *argv],
        cwd=ROOT,
        env={**ENVIRONMENT, **(environment or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: "subprocess.Popen[str]") -> tuple[int, list[str]]:
    """Exit code and lines on stderr."""
    _, printed = process.communicate(timeout=60)
    return process.returncode, printed.strip().splitlines()


def stopped(
    argv: list[str], number: signal.Signals, when: Callable[[], bool], to_child: bool = False
) -> tuple[int, list[str]]:
    """Exit code and lines on stderr of a run that gets a signal, or whose child does, once something is so."""
    process = start(argv)
    while process.poll() is None and not when():
        time.sleep(0.01)
    started = children(process.pid)
    os.kill(started[0] if to_child else process.pid, number)
    ended = end(process)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in started) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{child}").exists() for child in started)
    return ended


def catches_usr1(process: int) -> bool:
    """Whether a process handles SIGUSR1, which would otherwise kill it."""
    caught = next(line for line in Path(f"/proc/{process}/status").read_text().splitlines() if "SigCgt" in line)
    return bool(int(caught.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def bothered(*processes: "subprocess.Popen[str]") -> list[tuple[int, list[str]]]:
    """Exit codes and lines of processes that get SIGUSR1 over and over."""
    while not all(process.poll() is None and catches_usr1(process.pid) for process in processes):
        time.sleep(0.01)
    while any(process.poll() is None for process in processes):
        for process in processes:
            process.send_signal(signal.SIGUSR1)
        time.sleep(0.2)
    return [end(process) for process in processes]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_training(
    number: signal.Signals, code: int, copy: Callable[..., Path], run: Run, finished: tuple[Path, str]
) -> None:
    run_dir = copy(*STAGES[2:])
    folder = run_dir / "round-1" / "extreme_region"
    ended, lines = stopped(arguments(run_dir), number, lambda: any(folder.glob("checkpoints/step=*.ckpt")))
    assert (ended, lines) == (code, [STOPPED.format(number.name)])
    run(*arguments(run_dir))
    assert student(run_dir) == student(finished[0])


@pytest.mark.parametrize(
    ("stage", "number", "code"), [("rollouts", signal.SIGINT, 130), ("scoring", signal.SIGTERM, 143)]
)
def test_a_signal_in_another_stage(
    stage: str,
    number: signal.Signals,
    code: int,
    copy: Callable[..., Path],
    run: Run,
    finished: tuple[Path, str],
) -> None:
    run_dir = copy(*STAGES[STAGES.index(stage) :])
    argv = arguments(run_dir)
    ended, lines = stopped(argv, number, (run_dir / "round-1" / stage / "started.json").exists)
    assert (ended, lines) == (code, [STOPPED.format(number.name)])
    assert not (run_dir / "round-1" / stage / "stage.json").exists()
    run(*argv)
    assert student(run_dir) == student(finished[0])


SLURM = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "erpd", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


def test_sigusr1_at_any_time(finished: tuple[Path, str], tmp_path: Path) -> None:
    """With SLURM's variables, under which Lightning has handlers that save in the middle of anything."""
    environment = {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    [(code, lines)] = bothered(start(arguments(tmp_path / "run"), environment))
    assert (code, set(lines)) == (0, {IGNORED}), lines
    assert len(lines) > 10
    assert student(tmp_path / "run") == student(finished[0])


def test_sigusr1_to_two_processes_of_slurm(copy: Callable[..., Path]) -> None:
    run_dir = copy(*STAGES[1:])
    argv = [*arguments(run_dir), "--trainer.devices=2", "--trainer.strategy=ddp"]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    tasks = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    (code, lines), (other, told) = bothered(
        *(start(argv, {**SLURM, **place, **tasks, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in "01")
    )
    assert (code, other) == (0, 0), lines + told
    assert lines.count(IGNORED) > 10
    assert IGNORED not in told  # torch says where it was interrupted as it connects, and tries again
    assert "Traceback" not in "".join(lines + told)
    assert student(run_dir)


@pytest.mark.parametrize("to_child", [False, True])
def test_a_signal_to_one_process_of_two(to_child: bool, copy: Callable[..., Path]) -> None:
    run_dir = copy(*STAGES[2:])
    folder = run_dir / "round-1" / "extreme_region"
    argv = [*arguments(run_dir), "--trainer.devices=2", "--trainer.strategy=ddp", "--stage=extreme_region"]
    ended, lines = stopped(argv, signal.SIGTERM, lambda: any(folder.glob("checkpoints/step=*.ckpt")), to_child)
    assert (ended, lines[-1:]) == (143, [STOPPED.format("SIGTERM")]), lines
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


def test_tasks_that_lightning_cannot_place(monkeypatch: pytest.MonkeyPatch, refused: Run, tmp_path: Path) -> None:
    for name, value in {**SLURM, "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert "--ntasks-per-node=2" in refused(*arguments(tmp_path / "run"))


def test_a_mistake_is_told_once_by_two_processes(copy: Callable[..., Path]) -> None:
    run_dir = copy(*STAGES[2:])
    wild = ["--extreme_region.learning_rate=1e30", "--stage=extreme_region"]
    argv = [*arguments(run_dir), "--trainer.devices=2", "--trainer.strategy=ddp", *wild]
    code, lines = end(start(argv))
    told = [line for line in lines if line.startswith("error: ")]
    assert (code, len(told)) == (2, 1), lines


def test_a_mistake_is_told_once_under_torchrun(tmp_path: Path) -> None:
    argv = [*arguments(tmp_path / "run"), "--trainer.devices=2", "--trainer.strategy=ddp", "--data.group_size=0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "erpd_lightning", *argv]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told == ["error: data.group_size is 0: it must be at least 1"], done.stderr
    assert "stopped by" not in done.stderr
    assert re.search(r"local_rank: 0\)\s+exitcode  : 2 ", done.stderr), done.stderr
