"""Checks in processes of their own, each with a time limit, that end with the process that asked for them.

A process has one pool per function, for all verifiers that call it (`shared_pool`), and a pool one server: a Python
without the caller's `__main__`, that imports what the checks need once and forks a worker when it needs one (see
`worker_server`). While checks are quick one worker does them all. A check that takes long is left to its worker, and
another worker goes on with the rest: checks that hang do so beside each other, and together cost their time limit once,
up to 64 of them.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from ...errors import InvalidArgument, UserError
from . import worker_server
from .worker_server import receive, send

START_SECONDS = 120
"""Longest start of a server: it imports sympy, perhaps from a slow file system."""

MOST_SERVERS = 3
"""How often the calls of one `map` are tried where the server is ended from outside."""

SERVE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import serve; serve(*sys.argv[2:])"


def check_timeout(timeout: float) -> None:
    """Refuse a time limit that is none.

    Raises:
        InvalidArgument: If it is not a positive, finite number of seconds.
    """
    if not 0 < timeout < float("inf"):
        raise InvalidArgument("timeout", f"is {timeout}: it must be above 0 seconds, and finite")


_pools: dict[tuple[str, str | None], "WorkerPool"] = {}
_pools_lock = threading.Lock()


def shared_pool(function: str, argument: str | None = None) -> "WorkerPool":
    """This process's pool for a function; it lives as long as the process, and serves all who call the function.

    Args:
        function: See `WorkerPool`.
        argument: See `WorkerPool`.
    """
    with _pools_lock:
        return _pools.setdefault((function, argument), WorkerPool(function, argument))


def _forget_pools() -> None:
    """In a forked process: the servers are the parent's, and its threads, which may hold locks, are not here."""
    global _pools_lock
    _pools_lock = threading.Lock()
    _pools.clear()


os.register_at_fork(after_in_child=_forget_pools)


class WorkerPool:
    """Calls a function in worker processes, with a time limit for each call.

    The server starts with the first call and stays until the pool is closed or collected, or this process ends, in
    whatever way. A copy, also one in a forked process, starts a server of its own. Calls from several threads wait for
    one another.

    Args:
        function: `module:name` of a function of JSON values that gives one.
        argument: Where it is given, `function` is called with it once, in the server, and gives the function to call.
    """

    def __init__(self, function: str, argument: str | None = None) -> None:
        self.function = function
        self.argument = argument
        self._what = f"the process that checks answers with {argument or function}"
        self._lock = threading.Lock()
        self._server: tuple[int, subprocess.Popen[bytes], Connection] | None = None
        self._finalizer: weakref.finalize[..., WorkerPool] | None = None

    def __reduce__(self) -> tuple[type["WorkerPool"], tuple[str, str | None]]:
        return type(self), (self.function, self.argument)

    def start(self) -> None:
        """Start the server unless it runs.

        Raises:
            UserError: If it does not start, or there is no such function.
        """
        with self._lock:
            self._connect()

    def map(self, calls: Sequence[tuple[Any, ...]], timeout: float) -> list[Any]:
        """What the function gives for each tuple of arguments; None where it took too long, failed or died.

        Args:
            calls: Arguments, as JSON values.
            timeout: Seconds that one call may take.

        Raises:
            UserError: If the server does not start, or ends again and again.
        """
        results: list[Any] = [None] * len(calls)
        open_calls = dict(enumerate(calls))
        with self._lock:
            # A server that somebody ended is replaced; its calls are not to blame.
            for _ in range(MOST_SERVERS):
                if not open_calls:
                    return results
                try:
                    self._run(open_calls, results, timeout)
                except (EOFError, OSError):
                    self._close()
                except BaseException:
                    self._close()  # What it still has to say would be taken for the next call's results.
                    raise
        if open_calls:
            raise UserError(
                f"{self._what} was ended {MOST_SERVERS} times, with "
                f"{len(open_calls)} of {len(calls)} answers unchecked: see what ends it (too little memory?) and start "
                "again"
            )
        return results

    def _run(self, open_calls: dict[int, tuple[Any, ...]], results: list[Any], timeout: float) -> None:
        connection = self._connect()
        send(connection, [timeout, list(open_calls.items())])
        while open_calls:
            index, result = receive(connection)
            results[index] = result
            del open_calls[index]

    def _connect(self) -> Connection:
        if self._server is not None and self._server[0] == os.getpid():
            return self._server[2]
        try:
            server, connection = self._start()
        except OSError as error:
            raise UserError(f"{self._what} did not start: {type(error).__name__}: {error}") from None
        self._server = (os.getpid(), server, connection)
        self._finalizer = weakref.finalize(self, _end, os.getpid(), server, connection)
        # Importing what the checks need is not part of any check's time.
        problem: Any = f"nothing was heard of it for {START_SECONDS} seconds"
        with contextlib.suppress(EOFError, OSError):
            if connection.poll(START_SECONDS):
                problem = "it died"
                problem = receive(connection)
        if problem:
            self._close()
            raise UserError(f"{self._what} did not start: {problem}")
        return connection

    def _start(self) -> "tuple[subprocess.Popen[bytes], Connection]":
        ours, theirs = socket.socketpair()
        with ours, theirs:
            server = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    SERVE.format(module=worker_server.__name__),
                    json.dumps(sys.path),
                    str(theirs.fileno()),
                    str(os.getpid()),
                    self.function,
                    *([] if self.argument is None else [self.argument]),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            return server, Connection(ours.detach())

    def close(self) -> None:
        """End the server and its workers; the next call starts another."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._server = self._finalizer = None


def _end(owner: int, server: "subprocess.Popen[bytes]", connection: Connection) -> None:
    if os.getpid() != owner:
        return  # A forked copy: the server is its parent's.
    connection.close()
    try:
        server.wait(5)  # It ends its workers when the pipe closes.
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
