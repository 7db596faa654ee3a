"""Files: written whole or not at all, told apart by content, and a full disk named in a line."""

import errno
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError

RECENT = 2 * 10**9
"""Nanoseconds within which a file may change without its times telling: file systems differ in how fine they are."""

_digests: dict[tuple[str | int, ...], str] = {}
"""SHA-256 of files by path, size, times, inode and device."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a file so that `path` holds either what it held before or all of `data`.

    Raises:
        UserError: the disk is full, or the user's quota is used up.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with disk_full_named(path):
        try:
            with open(temporary, "xb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            # Give the space back, if the disk still lets us.
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal; a process reads a file again only where it changed."""
    state = os.stat(path)
    key = (os.path.realpath(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_dev)
    if key not in _digests:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        # What has just been written may be written again without another time.
        if time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) < RECENT:
            return digest
        _digests[key] = digest
    return _digests[key]


@contextmanager
def disk_full_named(path: str | Path) -> Iterator[None]:
    """Turn what a full disk raises, in whatever library, into one clear line.

    Args:
        path: What was being written.

    Raises:
        UserError: the disk is full, or the user's quota is used up.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # safetensors, for one, raises an exception of its own that has no errno.
        texts = (os.strerror(number) for number in DISK_FULL)
        if getattr(error, "errno", None) not in DISK_FULL and not any(text in str(error) for text in texts):
            raise
        raise UserError(f"disk full while writing {path}: free some space and start again") from error
