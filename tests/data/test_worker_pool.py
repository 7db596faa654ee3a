"""Checks in processes of their own: time limits, crashes, and nobody left behind."""

import contextlib
import mmap
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from erpd_lightning.data.verifiers import ExactMatch
from erpd_lightning.data.verifiers.worker_pool import WorkerPool, shared_pool
from erpd_lightning.errors import UserError
from support.processes import ROOT


def work(what: str, file: str) -> float:
    """Notes its process; then sleeps, dies, fails, takes memory or ends its server as it is told, or gives a number."""
    Path(file).write_text(str(os.getpid()))
    if what == "memory":
        return float(len(mmap.mmap(-1, 4 * 2**30)))  # at once where it is allowed
    if what == "end server":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
    if what == "end first server":
        if not Path(file + ".ended").exists():
            Path(file + ".ended").touch()
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(600)
        return 1.0
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
    calls = ["1", "hang", "0", "crash", "no number", "memory", "1"]
    files = [str(tmp_path / str(number)) for number in range(len(calls))]
    assert pool.map([*zip(calls, files, strict=True)], timeout=1.0) == [1.0, None, 0.0, None, None, None, 1.0]
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
import threading
from {__name__} import work
from erpd_lightning.data.verifiers import ExactMatch
from erpd_lightning.data.verifiers.worker_pool import WorkerPool, shared_pool
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


def test_a_server_that_is_ended_is_replaced(tmp_path: Path) -> None:
    pool = WorkerPool(f"{__name__}:work")
    calls = [("0", str(tmp_path / "a")), ("end first server", str(tmp_path / "b")), ("1", str(tmp_path / "c"))]
    assert pool.map(calls, timeout=5.0) == [0.0, 1.0, 1.0]
    pool.close()


def test_a_server_that_is_ended_again_and_again_is_one_line(tmp_path: Path) -> None:
    pool = WorkerPool(f"{__name__}:work")
    calls = [("0", str(tmp_path / "a")), ("end server", str(tmp_path / "b")), ("1", str(tmp_path / "c"))]
    with pytest.raises(UserError, match=r"was ended 3 times, with 2 of 3 answers unchecked") as error:
        pool.map(calls, timeout=5.0)
    assert "\n" not in str(error.value)
    assert pool.map(calls[:1], timeout=5.0) == [0.0]
    pool.close()


def test_two_pools_and_a_forked_copy_do_not_disturb_each_other(tmp_path: Path) -> None:
    pools = [WorkerPool(f"{__name__}:work") for _ in range(2)]
    files = [str(tmp_path / str(number)) for number in range(4)]
    assert [pool.map([("1", file)], timeout=5.0) for pool, file in zip(pools, files, strict=False)] == [[1.0], [1.0]]
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            found = pools[0].map([("0", files[2])], timeout=5.0)
            pools[0].close()
            os._exit(10 + int(found == [0.0]))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 11
    pools[1].close()
    assert pools[0].map([("1", files[3])], timeout=5.0) == [1.0]
    pids = [int(Path(file).read_text()) for file in files]
    # The parent's worker is the one that it had before.
    assert pids[3] == pids[0]
    assert len(set(pids)) == 3
    assert not is_there(pids[1])
    wait_until_gone([pids[2]])
    pools[0].close()
    wait_until_gone(pids)


def test_what_does_not_start_is_one_line() -> None:
    with pytest.raises(UserError, match="the process that checks answers with nowhere:nothing did not start") as error:
        WorkerPool("nowhere:nothing").map([("1",)], timeout=1.0)
    assert "\n" not in str(error.value)


def test_verifiers_share_a_pool_for_as_long_as_the_process_lives(tmp_path: Path) -> None:
    for number in range(2):
        verifier = ExactMatch(rf"<{number}>(\d)")
        assert verifier([f"<{number}>4"], ["4"]) == [1.0]
    function = f"{ExactMatch.__module__}:match_answer"
    pool = shared_pool(function)
    assert pool is shared_pool(function)
    server = children()
    assert pickle.loads(pickle.dumps(verifier))([f"<{number}>4"], ["5"]) == [0.0]
    assert children() == server


def children() -> set[int]:
    """Processes that this one has started and that are there."""
    own = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()
    return {int(pid) for pid in own.split() if is_there(int(pid))}


def test_a_copy_that_is_forked_while_the_pool_is_busy_starts_its_own(tmp_path: Path) -> None:
    function = f"{__name__}:work"
    busy = threading.Thread(target=shared_pool(function).map, args=([("hang", str(tmp_path / "a"))], 3.0))
    busy.start()
    while not (tmp_path / "a").exists():
        time.sleep(0.02)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        with contextlib.suppress(BaseException):
            found = shared_pool(function).map([("0", str(tmp_path / "b"))], timeout=5.0)
            shared_pool(function).close()
            os._exit(10 + int(found == [0.0]))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 11
    busy.join()
    shared_pool(function).close()


def test_what_answers_are_compared_with_needs_no_torch() -> None:
    """It would take seconds to start, and more memory than a worker may have."""
    code = "import sys, erpd_lightning.data.verifiers.math_check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0
