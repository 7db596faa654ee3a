"""Checks in processes of their own, each with a time limit, that end with the process that asked for them.

One server is started per pool: a Python without the caller's `__main__`, that imports what the checks need once and
forks a worker when it needs one. While checks are quick one worker does them all. A check that takes long is left to
its worker, and another worker goes on with the rest: checks that hang do so beside each other, and together cost
their time limit once, up to `MOST_WORKERS` of them.

The server waits for nothing but its pipes and looks whether its parent is still there; a worker that computes cannot
look, so the kernel ends it with the server (on Linux) or when its time is over (everywhere).
"""

import contextlib
import ctypes
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from ...errors import InvalidArgument, UserError

START_SECONDS = 120
"""Longest start of a server: it imports sympy, perhaps from a slow file system."""

PATIENCE_SECONDS = 0.1
"""How long a check may keep the others waiting before another worker is started for them."""

MOST_SERVERS = 3
"""How often the calls of one `map` are tried where the server is ended from outside."""

MOST_WORKERS = 64
PARENT_LOOK_SECONDS = 0.5
MEMORY_BYTES = 2 * 2**30
"""Address space of a worker: `9^{9^9}` must not take a machine's memory."""

SERVE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import serve; serve(*sys.argv[2:])"
PR_SET_PDEATHSIG = 1


def check_timeout(timeout: float) -> None:
    """Refuse a time limit that is none.

    Raises:
        InvalidArgument: If it is not a positive, finite number of seconds.
    """
    if not 0 < timeout < float("inf"):
        raise InvalidArgument("timeout", f"is {timeout}: it must be above 0 seconds, and finite")


class WorkerPool:
    """Calls a function in worker processes, with a time limit for each call.

    The server starts with the first call and stays until the pool is closed or collected, or this process ends, in
    whatever way. A copy, also one in a forked process, starts a server of its own.

    Args:
        function: `module:name` of a function of strings that gives a JSON value.
    """

    def __init__(self, function: str) -> None:
        self.function = function
        self._lock = threading.Lock()
        self._server: tuple[int, subprocess.Popen[bytes], Connection] | None = None
        self._finalizer: weakref.finalize[..., WorkerPool] | None = None

    def __reduce__(self) -> tuple[type["WorkerPool"], tuple[str]]:
        return type(self), (self.function,)

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
                f"the process that checks answers with {self.function} was ended {MOST_SERVERS} times, with "
                f"{len(open_calls)} of {len(calls)} answers unchecked: see what ends it (too little memory?) and start "
                "again"
            )
        return results

    def _run(self, open_calls: dict[int, tuple[Any, ...]], results: list[Any], timeout: float) -> None:
        connection = self._connect()
        _send(connection, [timeout, list(open_calls.items())])
        while open_calls:
            index, result = _receive(connection)
            results[index] = result
            del open_calls[index]

    def _connect(self) -> Connection:
        if self._server is not None and self._server[0] == os.getpid():
            return self._server[2]
        try:
            server, connection = self._start()
        except OSError as error:
            raise UserError(
                f"the process that checks answers with {self.function} did not start: {type(error).__name__}: {error}"
            ) from None
        self._server = (os.getpid(), server, connection)
        self._finalizer = weakref.finalize(self, _end, os.getpid(), server, connection)
        # Importing what the checks need is not part of any check's time.
        problem: Any = f"nothing was heard of it for {START_SECONDS} seconds"
        with contextlib.suppress(EOFError, OSError):
            if connection.poll(START_SECONDS):
                problem = "it died"
                problem = _receive(connection)
        if problem:
            self._close()
            raise UserError(f"the process that checks answers with {self.function} did not start: {problem}")
        return connection

    def _start(self) -> "tuple[subprocess.Popen[bytes], Connection]":
        ours, theirs = socket.socketpair()
        with ours, theirs:
            server = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    SERVE.format(module=__name__),
                    json.dumps(sys.path),
                    str(theirs.fileno()),
                    str(os.getpid()),
                    self.function,
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


def _send(connection: Connection, value: Any) -> None:
    connection.send_bytes(json.dumps(value).encode())


def _receive(connection: Connection) -> Any:
    return json.loads(connection.recv_bytes())


# In the server.


def serve(descriptor: str, parent: str, function: str) -> None:
    """Answer a pool's calls until it closes its end or its process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle.
    connection = Connection(int(descriptor))
    module, name = function.split(":")
    try:
        called = getattr(importlib.import_module(module), name)
    except Exception as error:
        return _send(connection, f"{type(error).__name__}: {error}")
    _send(connection, "")
    server = _Server(connection, int(parent), called)
    try:
        while server.hears_request():
            timeout, calls = _receive(connection)
            server.answer(timeout, [(index, tuple(arguments)) for index, arguments in calls])
    except (EOFError, OSError, _ParentGone):
        pass
    finally:
        server.end_workers()


class _ParentGone(Exception):
    pass


class _Worker:
    """A worker process, the call that it is at, and when that began."""

    def __init__(self, function: Callable[..., Any], inherited: Sequence[Connection]) -> None:
        ours, theirs = socket.socketpair()
        server = os.getpid()
        self.process = os.fork()
        if self.process == 0:
            ours.close()
            for connection in inherited:
                connection.close()
            with contextlib.suppress(BaseException):
                _work(Connection(theirs.detach()), server, function)
            os._exit(0)
        theirs.close()
        self.connection = Connection(ours.detach())
        self.index: int | None = None
        self.began = 0.0

    def begin(self, index: int, arguments: tuple[Any, ...], timeout: float) -> None:
        self.index, self.began = index, time.monotonic()
        with contextlib.suppress(OSError):  # It is dead: that is heard when it is waited for.
            _send(self.connection, [timeout, arguments])

    def end(self) -> None:
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        self.connection.close()


class _Server:
    """Deals calls out to workers.

    Args:
        connection: To the pool.
        parent: Process of the pool.
        function: What the workers call.
    """

    def __init__(self, connection: Connection, parent: int, function: Callable[..., Any]) -> None:
        self._connection = connection
        self._parent = parent
        self._function = function
        self._workers: list[_Worker] = []

    def hears_request(self) -> bool:
        """Wait for the pool; False once its process is gone."""
        while not self._connection.poll(PARENT_LOOK_SECONDS):
            if os.getppid() != self._parent:
                return False
        return True

    def answer(self, timeout: float, calls: list[tuple[int, tuple[Any, ...]]]) -> None:
        """Send `(index, result)` for each call, in the order in which they are done."""
        waiting = calls[::-1]
        while waiting or any(worker.index is not None for worker in self._workers):
            self._deal(waiting, timeout)
            busy = {w.connection: w for w in self._workers if w.index is not None}
            now = time.monotonic()
            ends = min(w.began for w in busy.values()) + timeout - now
            pause = min(max(ends, 0), PATIENCE_SECONDS if waiting else PARENT_LOOK_SECONDS)
            for heard in wait([*busy, self._connection], pause):
                if heard is self._connection:
                    raise _ParentGone  # It says nothing while it waits: its end has closed.
                self._finish(busy[heard])  # type: ignore[index]
            if os.getppid() != self._parent:
                raise _ParentGone
            for worker in [w for w in self._workers if w.index is not None]:
                if time.monotonic() - worker.began >= timeout:
                    self._give_up(worker)
        # One worker stays: what it has cached helps the next calls.
        for worker in self._workers[1:]:
            worker.end()
        del self._workers[1:]

    def _deal(self, waiting: list[tuple[int, tuple[Any, ...]]], timeout: float) -> None:
        for worker in self._workers:
            if waiting and worker.index is None:
                worker.begin(*waiting.pop(), timeout)
        if not waiting or len(self._workers) >= MOST_WORKERS:
            return
        latest = max((w.began for w in self._workers), default=0.0)
        if time.monotonic() - latest >= PATIENCE_SECONDS or not self._workers:
            worker = _Worker(self._function, [self._connection, *(w.connection for w in self._workers)])
            self._workers.append(worker)
            worker.begin(*waiting.pop(), timeout)

    def _finish(self, worker: _Worker) -> None:
        try:
            result = _receive(worker.connection)
        except (EOFError, OSError):
            return self._give_up(worker)
        _send(self._connection, [worker.index, result])
        worker.index = None

    def _give_up(self, worker: _Worker) -> None:
        """The call could not be done: it hangs, or its worker died on it."""
        worker.end()
        self._workers.remove(worker)
        _send(self._connection, [worker.index, None])

    def end_workers(self) -> None:
        """Kill the workers."""
        for worker in self._workers:
            worker.end()
        self._workers.clear()


# In a worker.


def _work(connection: Connection, server: int, function: Callable[..., Any]) -> None:
    """Call the function until the server is gone."""
    _end_with(server)
    while True:
        timeout, arguments = _receive(connection)
        # The default action of this signal ends a process also while it computes.
        signal.setitimer(signal.ITIMER_REAL, timeout + 5)
        try:
            result = function(*arguments)
        except (Exception, RecursionError, MemoryError):  # Whatever it trips over, it could not be done.
            result = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(connection, result)


def _end_with(server: int) -> None:
    """Let the kernel kill this process when the server ends, and refuse it more memory than it may need."""
    import resource

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:
        os._exit(1)
