"""Rows of files and data sets, and the prompts that their columns hold."""

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError, first_line
from ..repeated_keys import without_repeated_keys
from ..tokenize import Message, as_text
from .source import OPTIONS_EXAMPLE, PromptSource

MAX_EXACT_FLOAT = 2**53
"""Floats below this size that have an integer value stand for that integer alone."""

BATCH_ROWS = 1000
"""Rows that are made from Arrow at a time."""

LISTED = 8
"""The most names that a message lists."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, as text or as chat messages, and the answer that is correct for it."""

    prompt: str | list[Message]
    answer: str


class MissingColumn(Exception):
    """A column that is not there; its message says which are."""


def unit_of(source: PromptSource) -> str:
    """What the number of a row counts."""
    return "line" if source.is_file and Path(source.path).suffix not in (".json", ".parquet") else "row"


def iterate_rows(source: PromptSource) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a source, read as they are asked for, each with its number from 1: its line in a text file.

    Raises:
        UserError: If the source is missing or broken; names the line.
    """
    if not source.is_file:
        return _data_set_rows(source)
    path = Path(source.path)
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".json": _json_rows, ".parquet": _parquet_rows}
    kind = {".csv": "CSV", ".tsv": "TSV", ".json": "JSON", ".parquet": "Parquet"}.get(path.suffix, "JSONL")
    return _named_errors(path, kind, readers.get(path.suffix, _jsonl_rows)(path))


def _named_errors(path: Path, kind: str, rows: Iterator[Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow as pa

    try:
        yield from rows
    except FileNotFoundError:
        raise UserError(f"{path} is missing: a {kind} file of prompts is expected there") from None
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read as a {kind} file of prompts: {first_line(error)}") from error


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # Line ends of JSON Lines alone: universal ones, or those of str.splitlines, may stand in a JSON string.
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _as_row(parse_json(line, f"{path}, line {number}"), f"{path}, line {number}")


def _json_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        rows = parse_json(text, str(path))
        yield from ((number, _as_row(row, f"{path}, row {number}")) for number, row in enumerate(rows, start=1))
    else:
        yield from _jsonl_rows(path)  # Many data sets call them so.


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True, delimiter="\t" if path.suffix == ".tsv" else ",")
        for row in rows:
            if None in row or None in row.values():
                names = ", ".join(rows.fieldnames or [])
                raise UserError(f"{path}, line {rows.line_num} has not as many values as there are columns: {names}")
            yield rows.line_num, row


def _parquet_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        batches = (batch.to_pylist() for batch in file.iter_batches(BATCH_ROWS))
        yield from enumerate((row for batch in batches for row in batch), start=1)


def parse_json(text: str, where: str) -> Any:
    """What a text says as JSON.

    Args:
        text: The text.
        where: What to call it.

    Raises:
        UserError: If it is no JSON, or gives a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=without_repeated_keys)
    except RecursionError:
        raise UserError(f"{where} is nested too deeply to be read") from None
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error


def _as_row(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f'{where} must be an object like {{"prompt": …, "answer": …}}')
    return row


def _data_set_rows(source: PromptSource) -> Iterator[tuple[int, Mapping[str, Any]]]:
    from datasets import load_dataset

    split = source.loaded_split
    try:
        rows = load_dataset(
            str(source.path), source.config, split=split, revision=source.revision, streaming=source.streaming
        )
        rows = rows.select_columns(_needed(source, rows.column_names)) if rows.column_names else rows
        batches = rows if source.streaming else rows.with_format("arrow").iter(BATCH_ROWS)
    except UserError:
        raise
    except Exception as error:  # The many ways in which a data set can be missing or broken.
        raise UserError(_cannot_load(source, error)) from error
    numbered = enumerate(batches if source.streaming else (r for batch in batches for r in batch.to_pylist()), start=1)
    while True:
        try:
            number, row = next(numbered)
        except StopIteration:
            return
        except Exception as error:
            raise UserError(f"{source} cannot be read to its end: {first_line(error)}") from error
        yield number, row


def _needed(source: PromptSource, names: Sequence[str]) -> list[str]:
    """The columns of a data set that are read, or that hold those that are.

    Raises:
        UserError: Names the one that is not there.
    """
    needed: list[str] = []
    for column in filter(None, (source.prompt_column, source.answer_column, source.difficulty_column)):
        holds = [name for name in names if column == name or column.startswith(f"{name}.")]
        if not holds:
            raise UserError(f"{source} has no column {column!r} (there are: {listed(names)})")
        needed += [name for name in holds if name not in needed]
    return needed


def _cannot_load(source: PromptSource, error: Exception) -> str:
    """A line about a data set that cannot be loaded, with the configurations or splits that there are."""
    text = " ".join(str(error).split())
    wanted = {
        "split": (source.loaded_split, r"(?:Unknown split|Bad split)\b.*?(\[.*?\])"),
        "config": (source.config, r"(?:BuilderConfig .*? not found|Config name is missing)\b.*?(\[.*?\])"),
    }
    for key, (value, pattern) in wanted.items():
        if found := re.search(pattern, text):
            names = listed(re.findall(r"'([^']*)'", found[1]))
            said = f"names no {key}" if value is None else f"has no {key} {value}"
            return f"{source.path} {said}: there are {names}"
    return (
        f"{source.path} is neither a JSONL file nor a data set that can be loaded (split {source.loaded_split}; others "
        f"as in {OPTIONS_EXAMPLE}): {first_line(error)}"
    )


def listed(names: Sequence[str]) -> str:
    """Names in a message; the first ones where there are many."""
    shown = ", ".join(names[:LISTED])
    return f"{shown} and {len(names) - LISTED} more" if len(names) > LISTED else shown or "none"


def find_column(row: Mapping[str, Any], column: str) -> Any:
    """What is in a column, whose name may lead through others with dots.

    Raises:
        MissingColumn: Says which columns there are.
    """
    if column in row:
        return row[column]
    value: Any = row
    for depth, name in enumerate(names := column.split(".")):
        if not isinstance(value, Mapping) or name not in value:
            there = listed([".".join([*names[:depth], key]) for key in value]) if isinstance(value, Mapping) else "none"
            raise MissingColumn(f"has no column {column!r} (there are: {there})")
        value = value[name]
    return value


def make_prompt(source: PromptSource, prompt: Any, where: str) -> str | list[Message]:
    """What is asked: a row's prompt with the source's system prompt, prefix and suffix.

    Raises:
        UserError: If it is neither text nor chat messages.
    """
    is_chat = isinstance(prompt, list) and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in prompt
    )
    if not prompt or not (isinstance(prompt, str) or is_chat):
        raise UserError(
            f"{where}: {source.prompt_column} must be a string or a list of chat messages, not empty, to be a prompt"
        )
    check_whole(as_text(prompt), source.prompt_column, where)
    if isinstance(prompt, str):
        text = f"{source.prefix}{prompt}{source.suffix}"
        if not source.chat and source.system_prompt is None:
            return text
        messages = [{"role": "user", "content": text}]
    else:
        messages = _surrounded(source, prompt, where)
    if source.system_prompt is None:
        return messages
    if messages[0]["role"] == "system":
        raise UserError(f"{where} has a system message of its own: leave system_prompt null")
    return [{"role": "system", "content": source.system_prompt}, *messages]


def _surrounded(source: PromptSource, messages: list[Message], where: str) -> list[Message]:
    """Chat messages with prefix and suffix around what the user said last."""
    if not (source.prefix or source.suffix):
        return messages
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None or not isinstance(messages[last]["content"], str):
        raise UserError(f"{where} has no user's message of text to put prefix and suffix around")
    text = f"{source.prefix}{messages[last]['content']}{source.suffix}"
    return [*messages[:last], {**messages[last], "content": text}, *messages[last + 1 :]]


def as_answer(value: Any) -> str | None:
    """An answer as text, `18` for `18.0`; None for what is neither text nor a finite number."""
    if isinstance(value, float) and math.isfinite(value) and value.is_integer() and abs(value) < MAX_EXACT_FLOAT:
        value = int(value)
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return str(value) if isinstance(value, str) or number else None


def check_whole(text: str, name: str, where: str) -> None:
    """Whether a text can be written.

    Raises:
        UserError: If it has half a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise UserError(f"{where}: {name} has half a character, {half}: it was cut in two somewhere") from None
