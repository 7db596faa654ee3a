"""Rows of what was generated elsewhere, wherever they lie: read in any order, and never all in memory."""

import hashlib
import json
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line
from ..files import sha256_file
from .sources import PromptSource
from .sources.rows import parse_json
from .store import Store

ROWS_AT_A_TIME = 256


class Rows(ABC):
    """Rows of a file, a data set or a store.

    Attributes:
        name: What to call the whole of them.
        columns: Names of the columns of the first row.
    """

    name: str
    columns: list[str]

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def read(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Rows `start` to `stop`, the latter excluded.

        Raises:
            UserError: If one cannot be read; names it.
        """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """What tells their content apart from other's."""

    def where(self, index: int) -> str:
        """What to call a row."""
        return f"{self.name}, row {index + 1}"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), ROWS_AT_A_TIME):
            yield from self.read(start, min(start + ROWS_AT_A_TIME, len(self)))


class JSONLRows(Rows):
    """Lines of a JSON Lines file; empty ones do not count.

    Args:
        path: The file.

    Raises:
        UserError: If it cannot be read, or its first line is no object.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._offsets, self._lines = array("q"), array("q")
        try:
            with path.open("rb") as file:
                start = 0
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        self._offsets.append(start)
                        self._lines.append(number)
                    start += len(line)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        self.columns = list(self.read(0, 1)[0]) if self._offsets else []

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, start: int, stop: int) -> list[dict[str, Any]]:
        """See `Rows`."""
        with self._path.open("rb") as file:
            file.seek(self._offsets[start])
            lines = (line for line in file if line.strip())
            return [self._parsed(next(lines), index) for index in range(start, stop)]

    def _parsed(self, line: bytes, index: int) -> dict[str, Any]:
        where = self.where(index)
        try:
            text = line.decode("utf-8-sig" if index == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is no text: {error}") from error
        row = parse_json(text, where)
        if not isinstance(row, dict):
            raise UserError(f"{where} is no object: its columns by their names are expected")
        return row

    @property
    def fingerprint(self) -> str:
        """See `Rows`."""
        return sha256_file(self._path)

    def where(self, index: int) -> str:
        """See `Rows`."""
        return f"{self.name}, line {self._lines[index]}"


class DataSetRows(Rows):
    """Rows of whatever `datasets.load_dataset` finds, or of a Parquet file.

    Args:
        source: The file, or a data set as `PromptSource.parse` takes it.

    Raises:
        UserError: If it cannot be loaded.
    """

    def __init__(self, source: str) -> None:
        from datasets import load_dataset

        self.name = source
        parsed = PromptSource.parse(source)
        try:
            if parsed.is_file:
                self._rows = load_dataset("parquet", data_files=source, split="train")
            else:
                self._rows = load_dataset(parsed.path, parsed.config, split=parsed.loaded_split)
        except Exception as error:  # The many ways in which a data set can be missing or broken.
            raise UserError(
                f"{source} is no rollout store, JSONL or Parquet file, and no data set that can be loaded: "
                f"{first_line(error)}"
            ) from error
        self.columns = list(self._rows.column_names)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int) -> list[dict[str, Any]]:
        """See `Rows`."""
        columns = self._rows[start:stop]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    @property
    def fingerprint(self) -> str:
        """See `Rows`."""
        digest = hashlib.sha256()
        for row in self:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()


class StoreRows(Rows):
    """Rows of a finished rollout store.

    Args:
        store: The store.
    """

    def __init__(self, store: Store) -> None:
        if store.schema != "rollouts":
            raise UserError(f"{store.path} is a store of {store.schema}: one of rollouts is expected")
        self.name = str(store.path)
        self.store = store
        self._starts = list(accumulate((part["rows"] for part in store.parts), initial=0))
        self.columns = store.part(0).column_names

    def __len__(self) -> int:
        return self.store.rows

    def read(self, start: int, stop: int) -> list[dict[str, Any]]:
        """See `Rows`."""
        rows: list[dict[str, Any]] = []
        for index in range(bisect_right(self._starts, start) - 1, len(self.store.parts)):
            first, last = self._starts[index : index + 2]
            if first >= stop:
                break
            part = self.store.part(index)
            rows += part.slice(max(start - first, 0), min(stop, last) - max(start, first)).to_pylist()
        return rows

    @property
    def fingerprint(self) -> str:
        """See `Rows`."""
        return self.store.fingerprint


def open_rows(source: str | Path) -> Rows:
    """Rows of a rollout store, a JSONL or Parquet file, or a data set.

    Args:
        source: Directory, file, or a data set as `PromptSource.parse` takes it.

    Raises:
        UserError: If it is missing, damaged or empty.
    """
    path = Path(source)
    rows: Rows
    if Store.exists(path):
        rows = StoreRows(Store.open(path))
    elif path.suffix == ".jsonl" or (path.is_file() and path.suffix != ".parquet"):
        if not path.exists():
            raise UserError(f"{path} is missing: responses are expected there")
        rows = JSONLRows(path)
    else:
        rows = DataSetRows(str(source))
    if len(rows) == 0:
        raise UserError(f"{source} holds no responses")
    return rows
