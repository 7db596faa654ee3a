"""Processes that meet over gloo as those of `torchrun` do, forked once everything is imported.

A file with `see(folder, processes)` ends in `sys.exit(fork_ranks(see, Path(sys.argv[1])))`; a test calls `see` itself
for what one process sees, and `start_ranks` with the file for what each of two does. Nothing is forked inside of
pytest's own process.
"""

import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
"""In which a new process imports this tree and no installed one."""

MAX_SECONDS = 300
"""A process that still waits for another then ends by a signal."""

See = Callable[[Path, int], dict[str, Any]]
"""What one of some processes sees, from a folder that they share and their number."""


def fork(act: Callable[[], None], environment: Mapping[str, str] | None = None) -> int:
    """Call `act` in a child with more environment variables; returns the child's process id."""
    child = os.fork()
    if child != 0:
        return child
    code = 1
    signal.alarm(MAX_SECONDS)
    try:
        os.environ.update(environment or {})
        act()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def children(process: int) -> list[int]:
    """The processes that a process has started and that are there."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def exit_code(child: int) -> int:
    """Wait for a child to end; returns its exit code, negative for a signal."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def rank_environments(processes: int) -> list[dict[str, str]]:
    """Environment variables of each process of a group, by which they find one another."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
    return [{**place, "LOCAL_RANK": str(rank)} for rank in range(processes)]


def result_file(folder: Path, rank: int) -> Path:
    """What a process saw."""
    return folder / f"rank-{rank}.pt"


def fork_ranks(see: See, folder: Path, processes: int = 2) -> int:
    """Fork the processes of a group, which write what they see; returns 0 if all of them did."""
    torch.set_num_threads(1)

    def act() -> None:
        torch.save(see(folder, processes), result_file(folder, int(os.environ["LOCAL_RANK"])))

    children = [fork(act, environment) for environment in rank_environments(processes)]
    return max(abs(exit_code(child)) for child in children)


def start_ranks(file: str | None, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Start a file that forks two ranks, with the folder and more arguments; returns what each of them saw."""
    assert file is not None
    command = [sys.executable, file, str(folder), *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=MAX_SECONDS + 30)
    assert done.returncode == 0, done.stderr
    return [torch.load(result_file(folder, rank), weights_only=True) for rank in range(2)]
