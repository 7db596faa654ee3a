"""Immutable Parquet directories for rollouts and for the scores of policies on them.

A store is `part-00000.parquet …` and a `manifest.json` that is written last: a directory without a
manifest is unfinished. Every file is written under a temporary name and renamed, so a killed writer
leaves whole parts only, and the same rows give the same bytes, so a resumed run ends with the same
fingerprint. Each part holds its own digest: one that was damaged before the store was finished is not
taken for one that was written.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import UserError
from ..files import atomic_write, sha256_file, write_errors_named

VERSION = 2
MANIFEST = "manifest.json"
DIGEST = b"sha256"
"""Key in the metadata of a part's file under which it holds the SHA-256 of its bytes, taken with `NO_DIGEST` there."""
NO_DIGEST = b"SHA-256 of this file with these 64 characters in its place".ljust(64)


def _schema(name: str, columns: dict[str, pa.DataType]) -> pa.Schema:
    fields = [pa.field(column, kind, nullable=False) for column, kind in columns.items()]
    return pa.schema(fields, metadata={"name": name})


TOKEN_COLUMNS = ("group", "prompt_ids", "response_ids", "logps", "temperature", "reward")
"""Columns of the rollouts that training reads: the texts beside them may be larger than all that it needs."""

ROLLOUTS = _schema(
    "rollouts",
    {
        "group": pa.int64(),
        "sample": pa.int32(),
        "prompt_ids": pa.list_(pa.int32()),
        "response_ids": pa.list_(pa.int32()),
        "logps": pa.list_(pa.float32()),
        "temperature": pa.float64(),
        "reward": pa.float32(),
        "finish_reason": pa.string(),
        "checked": pa.bool_(),
        "prompt": pa.string(),
        "response": pa.string(),
        "answer": pa.string(),
        "rewards": pa.string(),
    },
)
"""One row per response. `group` numbers the prompt, `sample` the response within it; `logps` are
the sampler's log-probs of `response_ids` (nats) at its `temperature`; `finish_reason` is "stop" or "length"; `checked`
is false where the verifier could not decide; `rewards` is what the reward is made of, as JSON by name (see
`reward_parts`), `{}` where it is made of nothing else."""

LOGPS = _schema("logps", {"row": pa.int64(), "logps": pa.list_(pa.float32())})
"""Log-probs of one policy of the tokens of one response (nats): `row` is the row of the rollout store, all of which are
there in their order."""

RECORDED = _schema("recorded", {"row": pa.int64(), "reward": pa.float32()})
"""Scores that came with responses from elsewhere, of those that have one: `row` is the row of the rollout store."""

SCORES = _schema(
    "scores",
    {
        "row": pa.int64(),
        "logps": pa.list_(pa.float32()),
        "support_size": pa.list_(pa.int16()),
        "support_ids": pa.list_(pa.int32()),
        "support_logps": pa.list_(pa.float32()),
        "tail_logps": pa.list_(pa.float32()),
    },
)
"""What one policy says about one response (nats): `row` is the row of the rollout store. `logps`
(of the sampled token), `support_size` and `tail_logps` (of everything outside the support) have one
entry per response token; `support_ids` and `support_logps` hold the supports of all its tokens one
after the other."""


@dataclass(frozen=True)
class Store:
    """A finished store; made by `Store.open` or `StoreWriter.finish`.

    Attributes:
        path: The directory.
        schema: Name of the schema, "rollouts", "logps", "recorded" or "scores".
        rows: Number of rows.
        parts: `{"name", "rows", "bytes", "sha256"}` of each part, in order.
        metadata: What the writer was given.
        fingerprint: SHA-256 over all of the above but the path.
    """

    path: Path
    schema: str
    rows: int
    parts: list[dict[str, Any]]
    metadata: dict[str, Any]
    fingerprint: str

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Whether `path` holds a finished store."""
        return (Path(path) / MANIFEST).is_file()

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> "Store":
        """Open a finished store.

        Args:
            path: The directory.
            verify: Read every part and compare its hash. Without, only presence and size are
                compared.

        Raises:
            UserError: names the file that is missing, unreadable, altered or of another version.
        """
        path = Path(path)
        manifest = _read_manifest(path / MANIFEST)
        for part in manifest["parts"]:
            _check_part(path / part["name"], part, verify)
        return cls(
            path,
            manifest["schema"],
            manifest["rows"],
            manifest["parts"],
            manifest["metadata"],
            manifest["fingerprint"],
        )

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows in memory, in the order of the parts.

        Args:
            columns: Names of the columns to read; None for all of them.
        """
        return pa.concat_tables([self.part(index, columns) for index in range(len(self.parts))])

    def part(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of one part.

        Args:
            index: Its number.
            columns: Names of the columns to read; None for all of them.
        """
        path = self.path / self.parts[index]["name"]
        # Not pq.read_table: it takes a directory called `lr=1` for a column.
        return pq.ParquetFile(path, memory_map=True).read(columns=None if columns is None else list(columns))

    def batches(self, columns: Sequence[str] | None = None, rows: int = 1024) -> Iterator[pa.Table]:
        """All rows in the order of the parts, in tables of `rows` rows, the last of which may have fewer.

        Where a table ends depends on `rows` alone, not on the parts, so that stores with as many rows can be read side
        by side. No more than such a table and a part's row group are in memory at a time.

        Args:
            columns: Names of the columns to read; None for all of them.
            rows: Rows of a table.
        """
        names = None if columns is None else list(columns)
        pending: list[pa.RecordBatch] = []
        missing = rows
        for part in self.parts:
            file = pq.ParquetFile(self.path / part["name"], memory_map=True)
            for batch in file.iter_batches(batch_size=rows, columns=names):
                while missing <= batch.num_rows:
                    yield pa.Table.from_batches([*pending, batch.slice(0, missing)])
                    batch, pending, missing = batch.slice(missing), [], rows
                if batch.num_rows:
                    pending.append(batch)
                    missing -= batch.num_rows
        if pending:
            yield pa.Table.from_batches(pending)


def joined(stores: Sequence[Store], columns: Sequence[str] | None = None) -> pa.Table:
    """The rollouts of several stores one after the other; their groups are numbered on.

    Args:
        stores: Stores of the `ROLLOUTS` schema.
        columns: Names of the columns to read, `group` among them; None for all of them.
    """
    tables, groups = [], 0
    for store in stores:
        table = store.table(columns)
        number = pc.add(table["group"], groups)
        tables.append(table.set_column(table.schema.get_field_index("group"), ROLLOUTS.field("group"), number))
        groups = pc.max(number).as_py() + 1
    return pa.concat_tables(table.replace_schema_metadata(None) for table in tables)


class StoreWriter:
    """Writes a store part by part. Several processes may write different parts; one calls `finish`.

    Args:
        path: The directory, created if needed.
        schema: One of the schemas above.
        metadata: All that the rows depend on (policy, seed, settings), as JSON values and nothing
            else: it becomes part of the fingerprint, and parts written under different metadata do
            not count as written.
    """

    def __init__(self, path: str | Path, schema: pa.Schema, metadata: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.metadata: dict[str, Any] = json.loads(_canonical_json(dict(metadata)))
        self.schema = schema.with_metadata(
            {"name": schema.metadata[b"name"], "metadata": _canonical_json(self.metadata)}
        )
        with write_errors_named(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    def has_part(self, index: int) -> bool:
        """Whether the part was written already, under the same schema and metadata, and is as it was written."""
        path = self._part(index)
        try:
            written = pq.read_schema(path)
            digest = pq.read_metadata(path).metadata[DIGEST]
            content = path.read_bytes()
        except (OSError, KeyError, pa.ArrowException):
            return False
        same_settings = written.equals(self.schema) and written.metadata == self.schema.metadata
        return bool(same_settings and _digest(_replace_last(content, digest, NO_DIGEST)) == digest)

    def write_part(self, index: int, columns: Mapping[str, Any] | pa.Table) -> None:
        """Write one part atomically.

        Args:
            index: Its number, from 0.
            columns: A sequence, array or Arrow array per column of the schema, or an Arrow table.

        Raises:
            UserError: the disk is full, or the store is finished and so may not change any more.
            ValueError: a value is missing or does not fit its column.
        """
        if Store.exists(self.path):
            raise UserError(f"{self.path} holds a finished store: write to another directory or delete it first")
        if isinstance(columns, pa.Table):
            table = columns.select(self.schema.names).cast(self.schema)
        else:
            table = pa.Table.from_pydict(dict(columns), schema=self.schema)
        for name in self.schema.names:
            _check_complete(name, table[name])
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, self.schema, compression="zstd") as writer:
            # One chunk, so that the bytes do not depend on how the table was put together.
            writer.write_table(table.combine_chunks())
            writer.add_key_value_metadata({DIGEST: NO_DIGEST})
        content = sink.getvalue().to_pybytes()
        atomic_write(self._part(index), _replace_last(content, NO_DIGEST, _digest(content)))

    def finish(self, parts: int) -> Store:
        """Write the manifest over parts 0 … `parts` - 1 and remove what killed writers left behind.

        Raises:
            UserError: a part is missing or damaged, or the store was finished before with other content.
        """
        if parts < 1:
            raise ValueError(f"parts is {parts}: a store has at least one")
        if Store.exists(self.path):
            Store.open(self.path)
        for index in range(parts):
            if not self.has_part(index):
                raise UserError(
                    f"{self._part(index)} is missing or was written under other settings, or was altered since: "
                    "write it, or use another directory"
                )
        described = [_describe_part(self._part(index)) for index in range(parts)]
        manifest = {
            "version": VERSION,
            "schema": self.schema.metadata[b"name"].decode(),
            "rows": sum(part["rows"] for part in described),
            "parts": described,
            "metadata": self.metadata,
        }
        manifest["fingerprint"] = _fingerprint(manifest)
        if not Store.exists(self.path):
            atomic_write(self.path / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        store = Store.open(self.path, verify=False)
        if store.fingerprint != manifest["fingerprint"]:
            raise UserError(
                f"{self.path} holds a finished store with other content: write to another directory or delete it first"
            )
        return store

    def _part(self, index: int) -> Path:
        return self.path / f"part-{index:05d}.parquet"


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _replace_last(content: bytes, old: bytes, new: bytes) -> bytes:
    """Replace the last occurrence, which in a part is that in its metadata."""
    before, _, behind = content.rpartition(old)
    return before + new + behind


def _check_complete(name: str, column: pa.ChunkedArray) -> None:
    # Parquet turns a missing list into an empty one where the schema allows none.
    nested = pa.types.is_list(column.type)
    if column.null_count or (nested and pc.list_flatten(column).null_count):
        raise ValueError(f"column {name} has missing values")


def _canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _fingerprint(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "fingerprint"}
    return hashlib.sha256(_canonical_json(rest).encode()).hexdigest()


def _describe_part(path: Path) -> dict[str, Any]:
    return {
        "name": path.name,
        "rows": pq.read_metadata(path).num_rows,
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
    }


def _check_part(path: Path, expected: Mapping[str, Any], verify: bool) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing: {MANIFEST} lists it")
    same_size = path.stat().st_size == expected["bytes"]
    if not same_size or (verify and sha256_file(path) != expected["sha256"]):
        raise UserError(f"{path} was altered or truncated: it is not the file that {MANIFEST} lists")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} holds no finished store") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as the manifest of a store: {error}") from error
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != VERSION:
        raise UserError(f"{path} has version {version!r}: this release reads version {VERSION}")
    if manifest.get("fingerprint") != _fingerprint(manifest):
        raise UserError(f"{path} was altered: its fingerprint does not fit its content")
    return manifest
