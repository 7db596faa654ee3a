"""Signals that end a run: SIGTERM with exit code 143 and SIGINT with 130, and SIGTERM in training with a checkpoint.

Lightning's own handlers save and talk to other ranks inside the handler, where they may meet another rank's
collectives, and end with exit code 0. This one sets a flag while optimiser steps are made, which `ResumeCheckpoint`
agrees on over the ranks at the end of a step; at any other time it ends the process at once.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer


class Stopped(SystemExit):
    """The end of a run by a signal; its code is 128 and the signal's number."""


class StopSignals:
    """Handlers of the signals that end a run, and what they are to know.

    Attributes:
        received: The signal that ends the run, or None.
        deferring: Whether an optimiser step is being made, at whose end a checkpoint is saved.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.deferring = False
        self._installed = False
        self._launchers: list[Any] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals in this block; in the main thread, which alone can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {
            signal.SIGTERM: self._stop,
            signal.SIGINT: self._stop,
            signal.SIGUSR1: self._ignore,
        }
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        owner = os.getpid()
        self.received, self.deferring, self._installed, self._launchers = None, False, True, []
        try:
            yield
        finally:
            self._installed = False
            if os.getpid() == owner:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def watch(self, trainer: Trainer) -> None:
        """Keep Lightning's handlers from replacing these, and remember the processes that the trainer starts."""
        if self._installed:
            vars(trainer._signal_connector)["register_signal_handlers"] = lambda: None
            if trainer.strategy.launcher is not None:
                self._launchers.append(trainer.strategy.launcher)

    def agreed(self, trainer: Trainer) -> bool:
        """Whether any rank is to stop; call it on every rank."""
        flag = torch.tensor(float(self.received is not None), device=trainer.strategy.root_device)
        return bool(trainer.strategy.reduce(flag, reduce_op="sum") > 0)

    def stop(self) -> None:
        """End the run.

        Raises:
            Stopped: Always.
        """
        self.deferring = False
        self.received = self.received or signal.SIGTERM  # Where another rank received it.
        raise Stopped(128 + self.received)

    def _stop(self, number: int, frame: Any) -> None:
        first = self.received is None
        self.received = self.received or signal.Signals(number)
        if first:
            for launcher in self._launchers:  # Another rank has to hear of it too.
                for process in getattr(launcher, "procs", []):
                    process.send_signal(number)
            if _has_launcher():
                os.kill(os.getppid(), number)  # Lightning would kill it, without a line.
        if number == signal.SIGINT or not self.deferring:
            self.stop()

    def _ignore(self, number: int, frame: Any) -> None:
        os.write(2, f"{signal.Signals(number).name} is ignored: a run is not requeued yet\n".encode())


def launcher_ends(seconds: float) -> bool:
    """Whether this process was started by rank zero through Lightning, and that ends within some time."""
    if not _has_launcher():
        return False
    launcher, until = os.getppid(), time.monotonic() + seconds
    while os.getppid() == launcher and time.monotonic() < until:
        time.sleep(0.05)
    return os.getppid() != launcher


def _has_launcher() -> bool:
    """Whether Lightning started this process from that of rank zero."""
    return os.environ.get("LOCAL_RANK", "0") not in ("", "0") and _same_command(os.getppid())


def _same_command(process: int) -> bool:
    """Whether a process runs the same command as this one, as that does from which Lightning started this one."""
    try:
        # Lightning names the module otherwise than the user: what comes behind it is the same.
        theirs, own = (Path(f"/proc/{each}/cmdline").read_bytes().split(b"\0") for each in (process, "self"))
        return len(own) > len(sys.argv) > 1 and theirs[-len(sys.argv) :] == own[-len(sys.argv) :]
    except OSError:
        return False


stop_signals = StopSignals()
"""Those of this process; they are handled where the command line installs them, and nowhere else."""

os.register_at_fork(after_in_child=lambda: _forget_in_child())


def _forget_in_child() -> None:
    """A forked child, such as a verifier's, ends as any process does, and tells no one."""
    if stop_signals._installed:
        stop_signals._installed, stop_signals._launchers = False, []
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
