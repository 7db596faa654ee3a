"""Supervisor of a server that a run has started: ends it, and all that it has started, when the run ends in any way.

A program of its own, run by its path: it imports nothing but the standard library and starts in milliseconds. Its
standard input is a pipe that the run holds open; when that closes, or its parent is another one, the run is gone.
What the server leaves behind becomes a child of the supervisor (on Linux), however it was started, and is ended too.

Called as `supervisor.py PARENT GRACE COMMAND ARGUMENT…`; exits as the command did.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

LOOK_SECONDS = 0.5
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
NOT_STARTED = 127


def main(parent: int, grace: float, command: list[str]) -> int:
    """Run a command until it ends or the parent does; returns its exit code."""
    ended: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: ended.append(received))
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_end_with_us)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        return NOT_STARTED
    watched: list[Any] = [sys.stdin]
    if sys.platform == "linux":
        watched.append(os.pidfd_open(server.pid))
    while server.poll() is None and not ended and os.getppid() == parent:
        readable, _, _ = select.select(watched, [], [], LOOK_SECONDS)
        if sys.stdin in readable:  # Nothing is ever written to it: its end has closed.
            break
    _signal(_descendants(os.getpid()), signal.SIGTERM)
    limit = time.monotonic() + grace
    while time.monotonic() < limit and (server.poll() is None or _descendants(os.getpid())):
        _reap(server.pid)
        time.sleep(0.02)
    while left := _descendants(os.getpid()):
        _signal(left, signal.SIGKILL)
        server.poll()
        _reap(server.pid)
        time.sleep(0.02)
    return server.wait()


def _signal(processes: Iterable[int], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def _end_with_us() -> None:
    """Let the kernel end the server where the supervisor itself is killed."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _reap(but: int) -> None:
    """Collect the children that have ended, all but the server, whose exit code is asked for."""
    for child in _children(os.getpid()):
        if child != but:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, os.WNOHANG)


def _descendants(process: int) -> list[int]:
    """All processes below one that have not ended."""
    found: list[int] = []
    for child in _children(process):
        found += [child, *_descendants(child)]
    return [each for each in found if not _has_ended(each)]


def _children(process: int) -> Iterable[int]:
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{process}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{process}/task/{task}/children") as file:
                yield from map(int, file.read().split())


def _has_ended(process: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "Z"
    return True


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
