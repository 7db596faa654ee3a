"""This process among those of a run: which rank it is, who started it, and how a signal or a mistake ends it.

It does not wait for torch: signals are handled before anything large is imported. Lightning's own handlers save and
talk to other ranks inside the handler, where they may meet another rank's collectives, and end with exit code 0.
"""

import atexit
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from .errors import UserError, refuse

RANK_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
"""Where a process is told its rank; the first that is there counts, since torchrun may run inside of SLURM."""

LAUNCHER_VARIABLE = "ERPD_LAUNCHER"
"""Where a process that Lightning starts is told the process of rank zero, which started it."""

UNWIND_SECONDS = 15
"""How long a process may take to end after a signal: less than SLURM waits before it kills."""

LOOK_SECONDS = 0.1
"""How often rank zero looks whether the processes that it launched are there."""

FAILING_SECONDS = 1
"""How long a process that lost its connections may take to be gone: then it was the one that failed."""

TOLD_SECONDS = 10
"""How long another rank waits for rank zero to tell a mistake: as far as their starts may lie apart."""

PR_SET_PDEATHSIG = 1


def started_rank(environment: Mapping[str, str] = os.environ) -> int:
    """The rank that this process was started as, by whatever started it; 0 where nobody says.

    Raises:
        UserError: If what is said is no rank.
    """
    for name in RANK_VARIABLES:
        if name in environment:
            if not environment[name].isdecimal():
                raise UserError(
                    f"the environment variable {name} is {environment[name]!r}: a rank, from 0, is expected"
                )
            return int(environment[name])
    return 0


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, in whatever way (on Linux); it may have done so already.

    Args:
        parent: Process id of the parent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class RunProcess:
    """What this process knows of the run that it belongs to, and its handlers of signals.

    SIGTERM and SIGINT end it with a line of rank zero's and the code 128 and the signal's number. While optimiser
    steps are made, SIGTERM only leaves a note, on which `ResumeCheckpoint` agrees over the ranks at the end of a step.
    SIGUSR1 is ignored.

    Attributes:
        received: The signal that ends the run, or None.
        deferring: Whether an optimiser step is being made, at whose end a checkpoint is saved.
        handling: Whether the handlers are in place.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.deferring = self.handling = False
        self._is_main = self._unwinds = self._stopping = self._told = self._refusing = False
        self._launchers: list[Any] = []
        self._launcher: int | None = None
        self._rank_zero: int | None = None

    def begin(self) -> None:
        """Handle signals from here until this process ends, which is the command line's alone; call it first.

        A process that Lightning started ends with the one that started it.
        """
        self._is_main = True
        handlers = self._install()
        # Called last, before Python puts the default actions back: nothing is left to end, and the exit code stands.
        atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in handlers])
        launcher = os.environ.pop(LAUNCHER_VARIABLE, "")
        if launcher.isdecimal() and os.environ.get("LOCAL_RANK", "0") not in ("", "0"):
            self._launcher = self._rank_zero = int(launcher)
            end_with_parent(self._launcher)
        else:
            self._rank_zero = _rank_zero_beside()

    @contextlib.contextmanager
    def unwinding(self) -> Iterator[None]:
        """A signal unwinds this block, which then ends in a line and an exit code; elsewhere it ends the process.

        Only the main thread can handle signals: in another one, nothing happens here.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.received, self._launchers, self._stopping, self._told = None, [], False, False
        before, owner = self._install(), os.getpid()
        self._unwinds = True
        try:
            yield
            for process in self._launched():  # It ends with this one: let it finish what it is at.
                process.wait()
            self._end_with_launched()
            if any(process.returncode for process in self._launched()):
                sys.exit(1)
        except BaseException as error:
            if self.received is None and not isinstance(error, SystemExit) and self._launched():
                time.sleep(FAILING_SECONDS)
                self._end_with_launched()
            if self.received is not None:
                self._tell()
                self._leave(128 + self.received, error)
            if isinstance(error, SystemExit) and isinstance(error.code, int):
                self._leave(error.code, error)
            raise
        finally:
            self._unwinds = self.deferring = False
            if os.getpid() == owner and not self._is_main:
                self.handling = False
                for number, handler in before.items():
                    signal.signal(number, handler)

    def launches(self, launcher: Any) -> None:
        """Remember what starts other processes of the run, and let them know this one.

        Args:
            launcher: Of a Lightning trainer's strategy.
        """
        self._launchers.append(launcher)
        os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
        if self._is_main and len(self._launchers) == 1:
            threading.Thread(target=self._watch_launched, daemon=True).start()

    def stop(self) -> NoReturn:
        """End the run.

        Raises:
            SystemExit: Always, in the block that unwinds.
        """
        self.deferring, self._stopping = False, True
        self.received = self.received or signal.SIGTERM  # Where another rank received it.
        if not self._unwinds:
            self._exit()
        # What this one launched would end with it. One that waits inside of torch cannot heed a signal, and would tell
        # at length that its connection broke, which it does while this one unwinds.
        for process in self._launched():
            process.kill()
        if self._is_main:  # What it unwinds may hang, or swallow the exception.
            signal.setitimer(signal.ITIMER_REAL, UNWIND_SECONDS)
        raise SystemExit(128 + self.received)

    def refuse(self, message: str) -> NoReturn:
        """End with a mistake of the user's and exit code 2; another rank than zero tells it only if rank zero does not.

        Another rank cannot know whether rank zero meets the same mistake. So it waits for rank zero to end, or to be
        ended by what started both; if neither happens, the mistake is its own, or rank zero is on another machine.

        Args:
            message: A line or two.
        """
        self._refusing = True
        rank = started_rank()
        if rank == 0:
            refuse(message)
        if self._rank_zero_ends(TOLD_SECONDS):
            sys.exit(2)
        refuse(f"rank {rank}: {message}")

    def _rank_zero_ends(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self._rank_zero is not None and not _is_alive(self._rank_zero):
                return True
            time.sleep(0.05)
        return False

    def _launched(self) -> "list[subprocess.Popen[Any]]":
        """The processes that this one launched, by their local rank from 1 on."""
        return [process for launcher in self._launchers for process in getattr(launcher, "procs", [])]

    def _watch_launched(self) -> None:
        """Lightning looks every 5 s, and then kills without a line."""
        while True:
            self._end_with_launched()
            time.sleep(LOOK_SECONDS)

    def _end_with_launched(self) -> None:
        """End at once where a process that this one launched was killed, or has told why it ended.

        One that failed otherwise may have done so because this one fails, which has the better traceback.
        """
        for local_rank, process in enumerate(self._launched(), 1):
            code = process.poll()
            if not code or self.received is not None:
                continue
            if code - 128 in (signal.SIGTERM, signal.SIGINT):
                self.received = signal.Signals(code - 128)
                self._exit()
            if code < 0:
                name = signal.Signals(-code).name
                os.write(2, f"rank {local_rank} was ended by {name}: the same command goes on from here\n".encode())
                self._exit_with(128 - code)
            if code == 2:
                self._exit_with(2)

    def _leave(self, code: int, error: BaseException) -> NoReturn:
        """End with a code; in order as far as Python goes, but without torch's threads, which may abort the process."""
        if self._is_main:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            self._exit_with(code)
        raise SystemExit(code) from error

    def _install(self) -> dict[int, Any]:
        handlers: dict[int, Callable[[int, Any], None]] = {
            signal.SIGTERM: self._stop,
            signal.SIGINT: self._stop,
            signal.SIGUSR1: self._ignore,
        }
        if self._is_main:
            handlers[signal.SIGALRM] = lambda *_: self._exit()
        self.handling = True
        return {number: signal.signal(number, handler) for number, handler in handlers.items()}

    def _stop(self, number: int, frame: Any) -> None:
        if self._refusing:
            os._exit(2)
        first = self.received is None
        self.received = self.received or signal.Signals(number)
        if first:
            for process in self._launched():  # Another rank has to hear of it too.
                process.send_signal(number)
            if self._launcher is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._launcher, number)
        if (number == signal.SIGINT or not self.deferring) and not self._stopping:
            self.stop()

    def _ignore(self, number: int, frame: Any) -> None:
        if started_rank() == 0:
            os.write(2, f"{signal.Signals(number).name} is ignored: a run is not requeued yet\n".encode())

    def _exit(self) -> NoReturn:
        """End at once: where there is nothing to unwind, or unwinding takes too long."""
        assert self.received is not None
        self._tell()
        self._exit_with(128 + self.received)

    def _exit_with(self, code: int) -> NoReturn:
        """End at once. What it launched goes first, before torch prints there that a connection is lost."""
        for process in self._launched():
            process.kill()
        os._exit(code)

    def _tell(self) -> None:
        if self.received is not None and not self._told and started_rank() == 0:
            self._told = True
            os.write(2, f"stopped by {self.received.name}: the same command goes on from here\n".encode())

    def _forget_in_child(self) -> None:
        """A forked child, such as a verifier's, ends as any process does, and tells no one."""
        if self.handling:
            self.handling = self._is_main = False
            self._launchers, self._launcher = [], None
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _rank_zero_beside() -> int | None:
    """The process of rank zero where torchrun or srun started it beside this one; None where it cannot be seen."""
    parent = os.getppid()
    try:
        if started_rank() == 0:
            return None
        for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            pairs = Path(f"/proc/{child}/environ").read_text(errors="replace").split("\0")
            environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            if any(name in environment for name in RANK_VARIABLES) and started_rank(environment) == 0:
                return int(child)
    except (OSError, UserError):
        return None
    return None


def _is_alive(process: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


run_process = RunProcess()
"""This one; its signals are handled where the command line asks for it, and nowhere else."""

os.register_at_fork(after_in_child=run_process._forget_in_child)
