"""The server of a pool of worker processes: it imports a function once, and forks workers that call it.

See `worker_pool`, which starts it. It waits for nothing but its pipes and looks whether its parent is still there; a
worker that computes cannot look, so the kernel ends it with the server (on Linux) or when its time is over
(everywhere).
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from ...processes import end_with_parent

PATIENCE_SECONDS = 0.05
"""How long a check may keep the others waiting before another worker is started for them; less where its time limit is
so short that this, for many checks that hang, would be more."""

PATIENCE_SHARE = 1 / 40
"""The share of its time limit that a check may keep the others waiting."""

SLOW_NICENESS = 5
"""By how much the priority of a check that takes longer is lowered: those that compute for ever must not slow down the
quick ones, and one that is only slow must get on beside a training."""

MOST_WORKERS = 64
PARENT_LOOK_SECONDS = 0.5
MEMORY_BYTES = 2 * 2**30
"""Address space that a worker may take beyond what the server has: `9^{9^9}` must not take a machine's memory."""


def send(connection: Connection, value: Any) -> None:
    """Send a JSON value."""
    connection.send_bytes(json.dumps(value).encode())


def receive(connection: Connection) -> Any:
    """Wait for a JSON value."""
    return json.loads(connection.recv_bytes())


def serve(descriptor: str, parent: str, function: str, argument: str | None = None) -> None:
    """Answer a pool's calls until it closes its end or its process is gone; see `WorkerPool` for the function."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle.
    connection = Connection(int(descriptor))
    module, name = function.split(":")
    try:
        called = getattr(importlib.import_module(module), name)
        called = called if argument is None else called(argument)
    except BaseException as error:
        return send(connection, " ".join(f"{type(error).__name__}: {error}".split()))
    send(connection, "")
    server = _Server(connection, int(parent), called)
    try:
        while server.hears_request():
            timeout, calls = receive(connection)
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
        self.is_slow = False

    def begin(self, index: int, arguments: tuple[Any, ...], timeout: float) -> None:
        self.index, self.began = index, time.monotonic()
        with contextlib.suppress(OSError):  # It is dead: that is heard when it is waited for.
            send(self.connection, [timeout, arguments])

    def slow_down(self) -> None:
        """Lower its priority; only root could raise it again."""
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self.process, os.getpriority(os.PRIO_PROCESS, 0) + SLOW_NICENESS)
        self.is_slow = True

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
        patience = min(PATIENCE_SECONDS, PATIENCE_SHARE * timeout)
        while waiting or any(worker.index is not None for worker in self._workers):
            self._deal(waiting, timeout, patience)
            busy = {w.connection: w for w in self._workers if w.index is not None}
            now = time.monotonic()
            ends = min(w.began for w in busy.values()) + timeout - now
            pause = min(max(ends, 0), patience if waiting else PARENT_LOOK_SECONDS)
            for heard in wait([*busy, self._connection], pause):
                if heard is self._connection:
                    raise _ParentGone  # It says nothing while it waits: its end has closed.
                self._finish(busy[heard])  # type: ignore[index]
            if os.getppid() != self._parent:
                raise _ParentGone
            for worker in [w for w in self._workers if w.index is not None]:
                age = time.monotonic() - worker.began
                if age >= timeout:
                    self._give_up(worker)
                elif age >= patience and not worker.is_slow:
                    worker.slow_down()
        # One worker stays: what it has cached helps the next calls.
        for worker in self._workers[1:]:
            worker.end()
        del self._workers[1:]

    def _deal(self, waiting: list[tuple[int, tuple[Any, ...]]], timeout: float, patience: float) -> None:
        for worker in self._workers:
            if waiting and worker.index is None:
                worker.begin(*waiting.pop(), timeout)
        if not waiting or len(self._workers) >= MOST_WORKERS:
            return
        latest = max((w.began for w in self._workers), default=0.0)
        if time.monotonic() - latest >= patience or not self._workers:
            worker = _Worker(self._function, [self._connection, *(w.connection for w in self._workers)])
            self._workers.append(worker)
            worker.begin(*waiting.pop(), timeout)

    def _finish(self, worker: _Worker) -> None:
        try:
            result = receive(worker.connection)
        except (EOFError, OSError):
            return self._give_up(worker)
        send(self._connection, [worker.index, result])
        worker.index = None
        if worker.is_slow:
            self._remove(worker)

    def _give_up(self, worker: _Worker) -> None:
        """The call could not be done: it hangs, or its worker died on it."""
        self._remove(worker)
        send(self._connection, [worker.index, None])

    def _remove(self, worker: _Worker) -> None:
        worker.end()
        self._workers.remove(worker)

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
        timeout, arguments = receive(connection)
        # The default action of this signal ends a process also while it computes.
        signal.setitimer(signal.ITIMER_REAL, timeout + 5)
        try:
            result = function(*arguments)
        except (Exception, RecursionError, MemoryError):  # Whatever it trips over, it could not be done.
            result = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(connection, result)


def _end_with(server: int) -> None:
    """Let the kernel kill this process when the server ends, and refuse it more memory than it may need."""
    import resource

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = _address_space() + MEMORY_BYTES
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    end_with_parent(server)


def _address_space() -> int:
    """Bytes that this process has mapped; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0
