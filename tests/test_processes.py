"""How a process of a run ends by a signal or by a mistake: real processes, of a few lines that import nothing large."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from support.processes import ENVIRONMENT, children

BEGIN = """
import os, signal, sys, time
from erpd_lightning import processes
from erpd_lightning.processes import run_process
processes.TOLD_SECONDS, processes.UNWIND_SECONDS = 3, 0.5
run_process.begin()
print("begun", flush=True)
"""

SLURM = [{"SLURM_NTASKS": "2", "SLURM_PROCID": rank} for rank in "01"]
TORCHRUN = [{"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]

END = {
    signal.SIGTERM: (143, "stopped by SIGTERM: the same command goes on from here\n"),
    signal.SIGINT: (130, "stopped by SIGINT: the same command goes on from here\n"),
}


def start(source: str, environment: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN + source],
        env={**ENVIRONMENT, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def begun(source: str, environment: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
    """A process that has told that it handles signals, or whatever comes first."""
    process = start(source, environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def end(process: "subprocess.Popen[str]") -> tuple[int, str]:
    _, told = process.communicate(timeout=20)
    return process.returncode, told


@pytest.mark.parametrize("number", END)
@pytest.mark.parametrize(
    "source",
    {
        "imports": "time.sleep(20)",
        "run": "with run_process.unwinding(): time.sleep(20)",
        "leaving": """
with run_process.unwinding(): pass
time.sleep(20)
""",
        "swallowed": """
with run_process.unwinding():
    try: time.sleep(20)
    except BaseException: time.sleep(20)
""",
    }.values(),
    ids=["imports", "run", "leaving", "swallowed"],
)
def test_a_signal_ends_the_process_at_any_time(number: signal.Signals, source: str) -> None:
    process = begun(source)
    time.sleep(0.2)
    process.send_signal(number)
    assert end(process) == END[number]


@pytest.mark.parametrize("number", [*END, signal.SIGUSR1])
def test_a_signal_to_what_is_left_of_a_process(number: signal.Signals) -> None:
    """Python puts the default actions back before a process is gone: its exit code stands."""
    process = begun("""
import ctypes
libc = ctypes.CDLL(None)
libc.__cxa_atexit(ctypes.cast(libc.sleep, ctypes.c_void_p), ctypes.c_void_p(1), None)  # sleep(1) once Python is gone
with run_process.unwinding(): pass
""")
    time.sleep(0.5)
    process.send_signal(number)
    assert end(process) == (0, "")


def test_a_signal_while_a_step_is_made_waits_for_its_end() -> None:
    process = begun("""
with run_process.unwinding():
    run_process.deferring = True
    print("begun", flush=True)
    time.sleep(0.5)
    print("saved", flush=True)
    run_process.stop()
""")
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    out, told = process.communicate(timeout=20)
    assert (process.returncode, told, out) == (*END[signal.SIGTERM], "saved\n")


def test_several_signals_are_one() -> None:
    process = begun("""
with run_process.unwinding():
    try: time.sleep(20)
    finally: time.sleep(0.3)
""")
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert end(process) == END[signal.SIGTERM]


def test_another_rank_ends_without_a_line() -> None:
    process = begun("time.sleep(20)", SLURM[1])
    process.send_signal(signal.SIGTERM)
    assert end(process) == (143, "")


def test_a_signal_that_is_for_requeueing() -> None:
    process = begun("time.sleep(0.5)")
    process.send_signal(signal.SIGUSR1)
    assert end(process) == (0, "SIGUSR1 is ignored: a run is not requeued yet\n")


@pytest.mark.parametrize("environments", [SLURM, TORCHRUN], ids=["srun", "torchrun"])
def test_a_mistake_that_two_ranks_meet_is_told_once(environments: list[dict[str, str]]) -> None:
    """Also where rank zero comes to it later than another rank."""
    first, second = (
        begun(f"time.sleep({pause}); run_process.refuse('all is wrong')", environment)
        for pause, environment in zip((1.0, 0.0), environments, strict=True)
    )
    assert end(first) == (2, "error: all is wrong\n")
    assert end(second) == (2, "")


def test_a_mistake_of_another_rank_alone_is_told_with_its_rank() -> None:
    first, second = (
        begun(source, environment)
        for source, environment in zip(("time.sleep(20)", "run_process.refuse('no such file')"), TORCHRUN, strict=True)
    )
    assert end(second) == (2, "error: rank 1: no such file\n")
    first.terminate()
    assert end(first) == END[signal.SIGTERM]


def test_a_rank_that_waits_is_ended_by_what_started_it() -> None:
    """As torchrun does once rank zero has ended, which is on another machine here."""
    process = begun("run_process.refuse('all is wrong')", {"RANK": "1", "WORLD_SIZE": "2"})
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert end(process) == (2, "")


LAUNCH = f"""
import subprocess
class Launcher:
    procs = []
with run_process.unwinding():
    run_process.launches(Launcher)
    child = {BEGIN + "time.sleep(<seconds>); sys.exit(<code>)"!r}
    environment = {{**os.environ, "LOCAL_RANK": "1"}}
    Launcher.procs.append(subprocess.Popen([sys.executable, "-c", child], env=environment))
    time.sleep(<wait>)
"""
"""Rank zero starts rank one, as Lightning does."""


def launch(seconds: float, code: int = 0, wait: float = 0) -> str:
    return LAUNCH.replace("<seconds>", str(seconds)).replace("<code>", str(code)).replace("<wait>", str(wait))


def is_gone(process: int) -> bool:
    return not Path(f"/proc/{process}").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_rank_ends_with_the_one_that_started_it(number: signal.Signals) -> None:
    process = begun(launch(seconds=30, wait=30))
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    [child] = children(process.pid)
    process.send_signal(number)
    assert end(process) == END.get(number, (-number, ""))
    until = time.monotonic() + 5
    while not is_gone(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert is_gone(child)


@pytest.mark.parametrize("code", [0, 1, 2])
def test_rank_zero_waits_for_the_others(code: int) -> None:
    before = time.monotonic()
    assert end(begun(launch(seconds=1, code=code))) == (code, "")
    assert time.monotonic() - before > 1


def test_rank_zero_ends_with_another_that_has_told_a_mistake() -> None:
    before = time.monotonic()
    assert end(begun(launch(seconds=0.5, code=2, wait=30))) == (2, "")
    assert time.monotonic() - before < 5


def test_what_fails_for_want_of_another_rank_is_not_told() -> None:
    """It comes before the other process is gone."""
    source = launch(seconds=0.5, code=2).replace("time.sleep(0)", "raise RuntimeError('Connection reset by peer')")
    assert end(begun(source)) == (2, "")


def test_what_fails_beside_another_rank_is_told() -> None:
    source = launch(seconds=0.5, code=1).replace("time.sleep(0)", "raise RuntimeError('out of memory')")
    code, told = end(begun(source))
    assert (code, told.splitlines()[-1]) == (1, "RuntimeError: out of memory")


def test_rank_zero_says_that_another_was_killed() -> None:
    process = begun(launch(seconds=30, wait=30))
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    os.kill(children(process.pid)[0], signal.SIGKILL)
    assert end(process) == (137, "rank 1 was ended by SIGKILL: the same command goes on from here\n")


def test_a_signal_to_a_rank_ends_the_one_that_started_it() -> None:
    process = begun(launch(seconds=30, wait=30))
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    os.kill(children(process.pid)[0], signal.SIGTERM)
    assert end(process) == END[signal.SIGTERM]
