"""Places at which a run of the command line is killed: just before or after what Python reports, or before a call."""

import functools
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

MODULE = "erpd_lightning.modules.training:TrainingModule"
EVALUATION = "erpd_lightning.modules.evaluation:EvaluationModule"
CHECKPOINT = r"step=\d+\.ckpt"


@dataclass(frozen=True)
class Kill:
    """Where a run is killed.

    Attributes:
        what: Name of an audit event (`open`, `os.rename`, ...) or, with a colon, of a method (`module:Class.method`).
        path: Pattern that is found in one of the event's arguments.
        count: Which of the events or calls it is.
        after: Kill at the event that follows instead of right before this one.
        trains: Whether the next run goes on in the middle of training, from a checkpoint.
    """

    what: str
    path: str = ""
    count: int = 1
    after: bool = False
    trains: bool = False

    def arm(self) -> None:
        """Kill this very process there."""
        if ":" in self.what:
            self._arm_call()
        else:
            self._arm_event()

    def _arm_event(self) -> None:
        """By what Python reports of itself (`sys.addaudithook`)."""
        seen = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event == "os.kill":  # Its own.
                return
            if seen == self.count:
                kill_self()
            if event == self.what and any(re.search(self.path, str(argument)) for argument in arguments):
                seen += 1
                if seen == self.count and not self.after:
                    kill_self()

        sys.addaudithook(watch)

    def _arm_call(self) -> None:
        left = self.count

        def act(*_: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                kill_self()

        before_call(self.what, act)


def written(path: str, count: int = 1, trains: bool = False) -> Kill:
    """Right before a file appears under its name: all of its content lies beside it."""
    return Kill("os.rename", f"{path}$", count, trains=trains)


def after(kill: Kill) -> Kill:
    """Right after instead."""
    return replace(kill, after=True)


def kill_self() -> None:
    """No `finally`, no `atexit`, no flush."""
    os.kill(os.getpid(), signal.SIGKILL)


def before_call(target: str, act: Callable[..., None]) -> None:
    """Run `act` with the arguments of every call of a method (`module:Class.method`), first."""
    module, _, path = target.partition(":")
    owner, name = path.split(".")
    cls = getattr(importlib.import_module(module), owner)
    original = getattr(cls, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        act(*args)
        return original(*args, **kwargs)

    setattr(cls, name, wrapped)
