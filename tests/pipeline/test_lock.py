"""The lock of a run directory, which ends with the process that holds it."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from erpd_lightning.errors import UserError
from erpd_lightning.pipeline.lock import LOCK_FILE, lock_run_directory
from support.processes import ENVIRONMENT

HOLD = """
import os, subprocess, sys, time
from pathlib import Path
from erpd_lightning.pipeline.lock import lock_run_directory
with lock_run_directory(Path(sys.argv[1])):
    if sys.argv[2] == "started":
        print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
    elif os.fork() == 0:
        print(os.getpid(), flush=True)  # By then it has let go of the lock, however late it came to run.
    time.sleep(60)
"""


def test_a_second_holder_is_told_who_holds_it(tmp_path: Path) -> None:
    with lock_run_directory(tmp_path):
        name = f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(UserError, match=f"run_dir {tmp_path} is in use by {name}"), lock_run_directory(tmp_path):
            pass
        # The one that was refused has let the lock and the name of its holder be.
        with pytest.raises(UserError, match=name), lock_run_directory(tmp_path):
            pass
    assert (tmp_path / LOCK_FILE).read_bytes() == b""
    with lock_run_directory(tmp_path):
        pass


def test_a_lock_of_somebody_who_does_not_say_who(tmp_path: Path) -> None:
    with open(tmp_path / LOCK_FILE, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is in use by another process"), lock_run_directory(tmp_path):
            pass


@pytest.mark.parametrize("kind", ["forked", "started"])
def test_the_lock_dies_with_its_holder_and_not_with_its_children(tmp_path: Path, kind: str) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path), kind]
    holder = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(UserError, match=f"process {holder.pid} on "), lock_run_directory(tmp_path):
            pass
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # It is still there.
        with lock_run_directory(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_a_file_system_without_locks_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match=r"\.lock cannot be locked"), lock_run_directory(tmp_path):
        assert (tmp_path / LOCK_FILE).read_bytes() == b""
