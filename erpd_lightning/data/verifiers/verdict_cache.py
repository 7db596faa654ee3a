"""What a judge replied, kept in a folder of JSON Lines so that nothing is asked twice."""

import hashlib
import json
import os
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

from ...errors import UserError
from ...files import write_errors_named


class VerdictCache:
    """Replies by what was asked.

    Each process appends to a file of its own, `{"key": SHA-256 of what was asked, "asked": …, "reply": …}` a line, and
    all of them read all files when they begin. A line that a killed process left unfinished is passed over.

    Args:
        folder: The folder; None to keep the replies in memory alone.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._lock = threading.Lock()
        self._replies: dict[str, str] | None = None
        self._file: tuple[int, Path] | None = None

    def __getstate__(self) -> dict[str, str | None]:
        return {"folder": None if self._folder is None else str(self._folder)}

    def __setstate__(self, state: dict[str, str | None]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]

    def open(self) -> None:
        """Read what is kept.

        Raises:
            UserError: If the folder cannot be made, read or written.
        """
        with self._lock:
            self._read()

    def get(self, asked: str) -> str | None:
        """The reply to what was asked before, or None."""
        with self._lock:
            return self._read().get(_key(asked))

    def put(self, asked: str, reply: str) -> None:
        """Keep a reply."""
        with self._lock:
            self._read()[_key(asked)] = reply
            if self._folder is None:
                return
            if self._file is None or self._file[0] != os.getpid():
                self._file = (os.getpid(), self._folder / f"{os.getpid()}-{secrets.token_hex(4)}.jsonl")
            line = json.dumps({"key": _key(asked), "asked": json.loads(asked), "reply": reply})
            with write_errors_named(self._file[1]), open(self._file[1], "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def _read(self) -> dict[str, str]:
        if self._replies is None:
            self._replies = {}
            if self._folder is not None:
                try:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    if not os.access(self._folder, os.W_OK):
                        raise PermissionError("it cannot be written to")
                    for path in sorted(self._folder.glob("*.jsonl")):
                        self._replies.update(_pairs(path))
                except OSError as error:
                    raise UserError(f"cache {self._folder} cannot be used for verdicts: {error}") from None
        return self._replies


def _key(asked: str) -> str:
    return hashlib.sha256(asked.encode()).hexdigest()


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Keys and replies of a file; without lines that are cut short or something else."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                key, reply = row["key"], row["reply"]
            except (ValueError, TypeError, LookupError, RecursionError):
                continue
            if isinstance(key, str) and isinstance(reply, str):
                yield key, reply
