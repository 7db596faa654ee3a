"""Lock of a run directory: one `fit` at a time, for as long as its process lives."""

import errno
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

LOCK_FILE = ".lock"

HELD = (errno.EWOULDBLOCK, errno.EACCES)
"""What `flock` says where somebody else holds the lock; any other error is that of a file system without locks."""

_open: set[int] = set()
"""Descriptors of the locks that this process has open."""


@contextmanager
def lock_run_directory(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run directory in this block; only rank zero of a run needs to.

    The kernel lets go of it when the process ends, in whatever way. Processes that this one starts do not hold it:
    started ones close its file, and so do forked ones, first of all. The file itself stays: whoever deleted it could
    delete the one that another process has just locked.

    Raises:
        UserError: If another process holds it, naming that one.
        OSError: If the file cannot be opened.
    """
    path = run_dir / LOCK_FILE
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _open.add(descriptor)
    locked = False
    try:
        locked = _lock(descriptor, path)
        if locked:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        if descriptor in _open:  # A forked child has closed it.
            _open.discard(descriptor)
            if locked:
                os.truncate(descriptor, 0)
            os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    """Whether the lock could be taken; not where the file system knows no locks.

    Raises:
        UserError: If another process holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            holder = os.pread(descriptor, 400, 0).decode(errors="replace").split()
            name = f"process {holder[0]} on {holder[1]}" if len(holder) == 2 else "another process"
            raise UserError(
                f"run_dir {path.parent} is in use by {name}, with which its lock ends: wait for that, or give another "
                "run_dir"
            ) from error
        warnings.warn(
            f"{path} cannot be locked ({error.strerror}): nothing keeps a second run from writing into {path.parent}",
            stacklevel=4,
        )
        return False
    return True


def _close_in_child() -> None:
    """A forked child, such as a data loader's worker, must not hold the lock when its parent is gone."""
    while _open:
        os.close(_open.pop())


os.register_at_fork(after_in_child=_close_in_child)
