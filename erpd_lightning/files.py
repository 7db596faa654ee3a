"""Files: written whole or not at all, told apart by content, sealed, and a line where one cannot be written."""

import errno
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import UserError

RECENT = 2 * 10**9
"""Nanoseconds within which a file may change without its times telling: file systems differ in how fine they are."""

_digests: dict[tuple[str | int, ...], str] = {}
"""SHA-256 of files by path, size, times, inode and device."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

NOT_WRITABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
)
"""Why a file or folder cannot be written, where its permissions, or what lies in its place, are the reason."""

SEAL = "sha256"
"""Key under which a sealed JSON object holds the digest of the others."""


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a file so that `path` holds either what it held before or all of `data`.

    Raises:
        UserError: the disk is full, the user's quota is used up, or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with write_errors_named(path):
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


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """The same JSON object with a digest of its content, by which damage that leaves it JSON is noticed.

    The time that something took is left out: what is the same but for that has the same digest.
    """
    return {**content, SEAL: _content_digest(content)}


def is_altered(content: Any) -> bool:
    """Whether a JSON object is sealed, but no longer holds what it was sealed with; without a seal nobody can tell."""
    return isinstance(content, dict) and SEAL in content and content[SEAL] != _content_digest(content)


def _content_digest(content: dict[str, Any]) -> str:
    kept = _without(content, {SEAL, "seconds", "cpu_seconds"})
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _without(value: Any, keys: set[str]) -> Any:
    """A JSON value without some keys of the objects in it."""
    if isinstance(value, list):
        return [_without(each, keys) for each in value]
    if isinstance(value, dict):
        return {key: _without(each, keys) for key, each in value.items() if key not in keys}
    return value


@contextmanager
def write_errors_named(path: str | Path) -> Iterator[None]:
    """Turn what keeps a file from being written, in whatever library, into one clear line.

    Args:
        path: What was being written.

    Raises:
        UserError: the disk is full, the user's quota is used up, a file system or folder is read-only, or a file lies
            where a folder is expected, or the other way round.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = getattr(error, "errno", None)
        # safetensors, for one, raises an exception of its own that has no errno.
        if number in DISK_FULL or any(os.strerror(each) in str(error) for each in DISK_FULL):
            raise UserError(f"disk full while writing {path}: free some space and start again") from error
        if number in NOT_WRITABLE and isinstance(error, OSError):
            where = error.filename2 or error.filename or path
            raise UserError(
                f"{where} cannot be written: {error.strerror}. Look at its permissions, and at what lies in its place"
            ) from error
        raise
