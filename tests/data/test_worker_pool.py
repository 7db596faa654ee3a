"""Checks in processes of their own: time limits, crashes, and nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from erpd_lightning.data.verifiers.worker_pool import WorkerPool
from erpd_lightning.errors import UserError
from support.processes import ROOT


def work(what: str, file: str) -> float:
    """Notes its process; then sleeps, dies or fails as it is told, or gives a number."""
    Path(file).write_text(str(os.getpid()))
    if what == "hang":
        time.sleep(600)
    if what == "crash":
        os._exit(3)
    return float(what)


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: list[int], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while any(map(is_there, pids)):
        assert time.monotonic() < end, pids
        time.sleep(0.05)


def test_only_the_call_that_hangs_crashes_or_fails_has_no_result(tmp_path: Path) -> None:
    pool = WorkerPool(f"{__name__}:work")
    calls = ["1", "hang", "0", "crash", "no number", "1"]
    files = [str(tmp_path / str(number)) for number in range(len(calls))]
    assert pool.map([*zip(calls, files, strict=True)], timeout=1.0) == [1.0, None, 0.0, None, None, 1.0]
    pids = [int(Path(file).read_text()) for file in files]
    pool.close()
    wait_until_gone(pids)


def test_calls_that_hang_cost_the_limit_about_once(tmp_path: Path) -> None:
    pool = WorkerPool(f"{__name__}:work")
    assert pool.map([("1", str(tmp_path / "first"))], timeout=5.0) == [1.0]  # started
    calls = [("hang" if number % 2 else "1", str(tmp_path / str(number))) for number in range(12)]
    start = time.monotonic()
    assert pool.map(calls, timeout=2.0) == [None if number % 2 else 1.0 for number in range(12)]
    assert time.monotonic() - start < 3 * 2.0
    pool.close()


def test_nobody_is_left_when_the_parent_is_killed(tmp_path: Path) -> None:
    code = f"""
import sys
from {__name__} import work
from erpd_lightning.data.verifiers.worker_pool import WorkerPool
WorkerPool("{__name__}:work").map([("1", sys.argv[1] + "/first"), ("hang", sys.argv[1] + "/second")], timeout=60.0)
"""
    paths = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parents[2] / "tests")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *sys.path])}
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    second = tmp_path / "second"
    end = time.monotonic() + 60
    while not second.is_file() or not second.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    pids = [int((tmp_path / name).read_text()) for name in ("first", "second")]
    assert is_there(pids[1])
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    wait_until_gone(pids)


def test_what_does_not_start_is_one_line() -> None:
    with pytest.raises(UserError, match="the process that checks answers with nowhere:nothing did not start") as error:
        WorkerPool("nowhere:nothing").map([("1",)], timeout=1.0)
    assert "\n" not in str(error.value)
