"""Stores hold exactly what was written, notice every change, and survive killed writers."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from erpd_lightning.data import store as store_module
from erpd_lightning.data.store import MANIFEST, NO_DIGEST, ROLLOUTS, SCORES, Store, StoreWriter
from erpd_lightning.errors import UserError
from erpd_lightning.files import sha256_file

ROOT = Path(__file__).parents[2]
METADATA = {"seed": 3, "sampler": {"temperature": 1.0, "stop": ["</s>", "é"]}}


def columns(start: int = 0, rows: int = 4) -> dict[str, list[Any]]:
    """Some rollouts; responses of 0 to 4 tokens, ids up to the largest that fits."""
    numbers = range(start, start + rows)
    return {
        "group": [i // 2 for i in numbers],
        "sample": [i % 2 for i in numbers],
        "prompt_ids": [[2**31 - 1, i] for i in numbers],
        "response_ids": [[i * 7 + t for t in range(i % 5)] for i in numbers],
        "logps": [[-0.25 * t - i for t in range(i % 5)] for i in numbers],
        "temperature": [0.7] * rows,
        "reward": [float(i % 2) for i in numbers],
        "finish_reason": ["stop" if i % 3 else "length" for i in numbers],
        "checked": [i % 4 != 0 for i in numbers],
        "prompt": [f"{i}+{i}:" for i in numbers],
        "response": [f"π₀ «{i}»\n" for i in numbers],
        "answer": [str(2 * i) for i in numbers],
        "rewards": ["{}" if i % 2 else '{"π": null}' for i in numbers],
    }


def write(path: Path, *parts: Any, metadata: dict[str, Any] = METADATA) -> Store:
    writer = StoreWriter(path, ROLLOUTS, metadata)
    for index, part in enumerate(parts):
        writer.write_part(index, part)
    return writer.finish(len(parts))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write(tmp_path / "store", columns(0), columns(4, rows=5))


def run_python(code: str, *args: object) -> "subprocess.Popen[bytes]":
    """A process that runs `code`, with this module's names in reach."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
    code = f"from test_store import *\n{code}"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=environment)


def temporary_files(path: Path) -> list[str]:
    return [p.name for p in path.iterdir() if p.name.endswith(".tmp")]


# What goes in comes out


def test_round_trip(store: Store) -> None:
    opened = Store.open(store.path)
    written = {name: a + b for (name, a), b in zip(columns(0).items(), columns(4, rows=5).values(), strict=True)}
    assert opened.table().to_pydict() == written
    assert opened.table().schema.equals(ROLLOUTS)
    assert opened.rows == 9
    assert opened.schema == "rollouts"
    assert opened.metadata == METADATA
    assert opened == store


def test_scores_round_trip(tmp_path: Path) -> None:
    scores = {
        "row": [5, 2],
        "logps": [[-1.0, -2.0], [-0.5]],
        "support_size": [[2, 1], [3]],
        "support_ids": [[7, 9, 1], [4, 5, 6]],
        "support_logps": [[-0.5, -1.5, -0.25], [-1.0, -2.0, -4.0]],
        "tail_logps": [[-3.0, -100.0], [-6.0]],
    }
    writer = StoreWriter(tmp_path, SCORES, {})
    writer.write_part(0, scores)
    store = writer.finish(1)
    assert store.schema == "scores"
    assert store.table().to_pydict() == scores


def test_the_parts_keep_their_order(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, ROLLOUTS, {})
    for index in (10, 2, 0, 5, 9, 1, 3, 8, 4, 7, 6):
        writer.write_part(index, columns(index, rows=1))
    prompts = writer.finish(11).table()["prompt"].to_pylist()
    assert prompts == [f"{i}+{i}:" for i in range(11)]


def test_a_directory_like_a_partition_adds_no_column(tmp_path: Path) -> None:
    store = write(tmp_path / "lr=1", columns())
    assert store.table().schema.names == ROLLOUTS.names


def test_lists_arrays_and_tables_give_the_same_bytes(tmp_path: Path) -> None:
    whole = columns(0, rows=6)
    arrays = {
        name: [np.asarray(v, np.int64 if name.endswith("ids") else np.float32) for v in values]
        if isinstance(values[0], list)
        else np.asarray(values)
        for name, values in whole.items()
    }
    table = pa.Table.from_pydict(whole)
    assert not table.schema.equals(ROLLOUTS)
    chunked = pa.concat_tables([table.slice(0, 2), table.slice(2)])
    reordered = table.select(list(reversed(ROLLOUTS.names)))
    forms = {"lists": whole, "arrays": arrays, "chunked": chunked, "reordered": reordered}
    stores = [write(tmp_path / name, form) for name, form in forms.items()]
    assert len({(s.path / "part-00000.parquet").read_bytes() for s in stores}) == 1
    assert len({s.fingerprint for s in stores}) == 1


def test_chunks_do_not_show_in_the_bytes_of_several_pages(tmp_path: Path) -> None:
    rows = 8000
    part = {**columns(0, rows), "response": [str(i) * 50 for i in range(rows)]}
    table = pa.Table.from_pydict(part, schema=ROLLOUTS)
    chunked = pa.concat_tables([table.slice(i, 33) for i in range(0, rows, 33)])
    assert write(tmp_path / "chunked", chunked).parts == write(tmp_path / "whole", table).parts


@pytest.mark.parametrize("name", ROLLOUTS.names)
def test_a_missing_value_is_refused(tmp_path: Path, name: str) -> None:
    part = columns()
    part[name][1] = None
    writer = StoreWriter(tmp_path, ROLLOUTS, {})
    with pytest.raises(ValueError, match=f"{name} has missing values"):
        writer.write_part(0, part)
    assert not writer.has_part(0)


@pytest.mark.parametrize("name", ["prompt_ids", "response_ids", "logps"])
def test_a_missing_token_is_refused(tmp_path: Path, name: str) -> None:
    part = columns()
    part[name][1][0] = None
    with pytest.raises(ValueError, match=f"{name} has missing values"):
        StoreWriter(tmp_path, ROLLOUTS, {}).write_part(0, pa.Table.from_pydict(part))


def test_metadata_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        StoreWriter(tmp_path, ROLLOUTS, {"temperature": float("nan")})


# Read in pieces, and by others


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 9, 100])
def test_batches_are_the_rows_in_order_whatever_the_parts_are(store: Store, rows: int) -> None:
    batches = list(store.batches(rows=rows))
    assert [batch.num_rows for batch in batches] == [min(rows, 9 - start) for start in range(0, 9, rows)]
    assert pa.concat_tables(batches).to_pydict() == store.table().to_pydict()


def test_only_the_named_columns_are_read(store: Store) -> None:
    names = ["reward", "response_ids"]
    assert store.table(names).column_names == names
    assert [batch.column_names for batch in store.batches(names, rows=5)] == [names, names]


def test_it_opens_as_a_data_set(store: Store, tmp_path: Path) -> None:
    files = str(store.path / "part-*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.to_dict() == store.table().to_pydict()


# The fingerprint


def change(name: str, value: Any) -> Callable[[], dict[str, Any]]:
    def changed() -> dict[str, Any]:
        part = columns()
        assert part[name][3] != value
        part[name][3] = value
        return part

    return changed


def test_the_fingerprint_does_not_depend_on_time_or_place(tmp_path: Path, store: Store) -> None:
    again = write(tmp_path / "again", columns(0), columns(4, rows=5))
    assert again.fingerprint == store.fingerprint
    assert Store.open(store.path).fingerprint == store.fingerprint
    for part in store.parts:
        assert (again.path / part["name"]).read_bytes() == (store.path / part["name"]).read_bytes()
    assert (again.path / MANIFEST).read_bytes() == (store.path / MANIFEST).read_bytes()


@pytest.mark.parametrize(
    "changed",
    [
        change("group", 2),
        change("sample", 0),
        change("prompt_ids", [2**31 - 2, 3]),
        change("response_ids", [21, 22, 24]),
        change("response_ids", [21, 22]),
        change("logps", [-3.0, -3.25, -3.5000002]),
        change("reward", 0.5),
        change("finish_reason", "stop"),
        change("checked", False),
        change("prompt", "3+3: "),
        change("response", ""),
        change("answer", "06"),
        lambda: columns(1),
        lambda: {name: values[::-1] for name, values in columns().items()},
        lambda: {name: values[:3] for name, values in columns().items()},
    ],
)
def test_the_fingerprint_shows_every_change(tmp_path: Path, changed: Callable[[], dict[str, Any]]) -> None:
    before = write(tmp_path / "before", columns())
    assert write(tmp_path / "after", changed()).fingerprint != before.fingerprint


@pytest.mark.parametrize("metadata", [{}, {**METADATA, "seed": 4}, {**METADATA, "more": None}])
def test_the_fingerprint_shows_other_metadata(tmp_path: Path, metadata: dict[str, Any]) -> None:
    before = write(tmp_path / "before", columns())
    after = write(tmp_path / "after", columns(), metadata=metadata)
    assert after.fingerprint != before.fingerprint


def test_the_fingerprint_is_the_hash_of_the_rest_of_the_manifest(store: Store) -> None:
    manifest = json.loads((store.path / MANIFEST).read_text())
    assert manifest.pop("fingerprint") == store.fingerprint
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == store.fingerprint


def test_sha256_file(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # From FIPS 180-2, appendix B.1.
    assert sha256_file(tmp_path / "abc") == ("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")


# Damage


@pytest.mark.parametrize("name", ["part-00000.parquet", "part-00001.parquet"])
@pytest.mark.parametrize("position", [0, 0.5, -1])
def test_an_altered_byte_is_noticed(store: Store, name: str, position: float) -> None:
    path = store.path / name
    data = bytearray(path.read_bytes())
    data[int(position * len(data)) if position > 0 else int(position)] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{name} was altered or truncated"):
        Store.open(store.path)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_part_is_noticed(store: Store, keep: int, verify: bool) -> None:
    path = store.path / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"part-00001.parquet was altered or truncated"):
        Store.open(store.path, verify=verify)


@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_part_is_noticed(store: Store, verify: bool) -> None:
    (store.path / "part-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"part-00001.parquet is missing"):
        Store.open(store.path, verify=verify)


def test_verify_is_what_reads_the_parts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def note(path: Path) -> str:
        read.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(store_module, "sha256_file", note)
    Store.open(store.path, verify=False)
    assert read == []
    Store.open(store.path)
    assert read == ["part-00000.parquet", "part-00001.parquet"]


def test_without_a_manifest_there_is_no_store(tmp_path: Path) -> None:
    StoreWriter(tmp_path, ROLLOUTS, {}).write_part(0, columns())
    assert not Store.exists(tmp_path)
    with pytest.raises(UserError, match=r"manifest.json is missing"):
        Store.open(tmp_path)
    assert not Store.exists(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"nowhere/manifest.json is missing"):
        Store.open(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"version": 1'])
def test_an_unreadable_manifest_is_named(store: Store, content: bytes) -> None:
    (store.path / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=r"manifest.json cannot be read"):
        Store.open(store.path)


@pytest.mark.parametrize("version", [0, 1, "2", None])
def test_an_unknown_version_is_named(store: Store, version: Any) -> None:
    manifest = json.loads((store.path / MANIFEST).read_text())
    (store.path / MANIFEST).write_text(json.dumps({**manifest, "version": version}))
    with pytest.raises(UserError, match=rf"manifest.json has version {version!r}"):
        Store.open(store.path)


def test_a_manifest_that_is_no_object_is_named(store: Store) -> None:
    (store.path / MANIFEST).write_text("[1]")
    with pytest.raises(UserError, match=r"manifest.json has version None"):
        Store.open(store.path)


@pytest.mark.parametrize(
    "change",
    [{"rows": 8}, {"metadata": {}}, {"schema": "scores"}, {"parts": []}, {"fingerprint": "0"}],
)
def test_an_altered_manifest_is_noticed(store: Store, change: dict[str, Any]) -> None:
    manifest = json.loads((store.path / MANIFEST).read_text())
    (store.path / MANIFEST).write_text(json.dumps({**manifest, **change}))
    with pytest.raises(UserError, match=r"manifest.json was altered"):
        Store.open(store.path)


# Killed and concurrent writers


def test_has_part(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, ROLLOUTS, METADATA)
    assert not writer.has_part(0)
    writer.write_part(0, columns())
    assert writer.has_part(0)
    assert not writer.has_part(1)
    assert StoreWriter(tmp_path, ROLLOUTS, dict(reversed(METADATA.items()))).has_part(0)
    assert not StoreWriter(tmp_path, ROLLOUTS, {**METADATA, "seed": 4}).has_part(0)
    assert not StoreWriter(tmp_path, SCORES, METADATA).has_part(0)
    path = tmp_path / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    assert not writer.has_part(0)


def test_an_altered_part_of_an_unfinished_store_is_not_taken_for_written(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, ROLLOUTS, METADATA)
    writer.write_part(0, columns())
    path = tmp_path / "part-00000.parquet"
    content = path.read_bytes()
    for position in range(0, len(content), 5):
        path.write_bytes(content[:position] + bytes([content[position] ^ 2]) + content[position + 1 :])
        assert not writer.has_part(0), position
    path.write_bytes(content)
    assert writer.has_part(0)
    path.write_bytes(content[:-100])
    assert not writer.has_part(0)
    with pytest.raises(UserError, match=r"part-00000.parquet is missing or .* was altered since"):
        writer.finish(1)
    writer.write_part(0, columns())
    assert path.read_bytes() == content


def test_zeros_and_the_digest_s_own_placeholder_among_the_rows(tmp_path: Path) -> None:
    rows = {**columns(), "prompt": [NO_DIGEST.decode(), "0" * 64, *columns()["prompt"][2:]]}
    writer = StoreWriter(tmp_path, ROLLOUTS, METADATA)
    writer.write_part(0, rows)
    assert writer.has_part(0)
    assert writer.finish(1).table().to_pydict() == rows


def test_parts_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    StoreWriter(tmp_path, ROLLOUTS, {"seed": 0}).write_part(0, columns())
    writer = StoreWriter(tmp_path, ROLLOUTS, {"seed": 1})
    writer.write_part(1, columns(4))
    with pytest.raises(UserError, match=r"part-00000.parquet is missing or was written under"):
        writer.finish(2)
    assert not Store.exists(tmp_path)
    writer.write_part(0, columns(8))
    assert writer.finish(2).table()["prompt"].to_pylist()[0] == "8+8:"


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = StoreWriter(tmp_path, ROLLOUTS, METADATA)

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            writer.write_part(0, columns())
    assert list(tmp_path.iterdir()) == []
    writer.write_part(0, columns())
    assert writer.finish(1).table().to_pydict() == columns()


def test_a_killed_writer_leaves_no_part(tmp_path: Path) -> None:
    code = """
import signal
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
StoreWriter(sys.argv[1], ROLLOUTS, METADATA).write_part(0, columns())
"""
    assert run_python(code, tmp_path / "killed").wait() == -9
    writer = StoreWriter(tmp_path / "killed", ROLLOUTS, METADATA)
    assert not writer.has_part(0)
    assert len(temporary_files(writer.path)) == 1
    writer.write_part(0, columns())
    resumed = writer.finish(1)
    assert sorted(p.name for p in resumed.path.iterdir()) == [MANIFEST, "part-00000.parquet"]
    assert resumed.fingerprint == write(tmp_path / "straight", columns()).fingerprint


def test_processes_write_different_parts(tmp_path: Path) -> None:
    code = """
for index in map(int, sys.argv[2:]):
    StoreWriter(sys.argv[1], ROLLOUTS, METADATA).write_part(index, columns(4 * index))
"""
    shares = [(0, 2, 4, 5), (1, 3, 5, 6)]  # both write part 5
    writers = [run_python(code, tmp_path / "shared", *share) for share in shares]
    assert [writer.wait() for writer in writers] == [0, 0]
    shared = StoreWriter(tmp_path / "shared", ROLLOUTS, METADATA).finish(7)
    alone = write(tmp_path / "alone", *(columns(4 * index) for index in range(7)))
    assert shared.fingerprint == alone.fingerprint
    assert temporary_files(shared.path) == []


@pytest.mark.parametrize("parts", [2, 3])
def test_finish_names_a_missing_part(tmp_path: Path, parts: int) -> None:
    writer = StoreWriter(tmp_path, ROLLOUTS, METADATA)
    for index in {0, 1, 2} - {parts - 1}:
        writer.write_part(index, columns())
    with pytest.raises(UserError, match=f"part-0000{parts - 1}.parquet is missing"):
        writer.finish(parts)
    assert not Store.exists(tmp_path)


def test_a_store_has_a_part(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="parts is 0"):
        StoreWriter(tmp_path, ROLLOUTS, {}).finish(0)


def test_a_finished_store_does_not_change(store: Store) -> None:
    before = {p.name: p.read_bytes() for p in store.path.iterdir()}
    writer = StoreWriter(store.path, ROLLOUTS, METADATA)
    with pytest.raises(UserError, match="finished store"):
        writer.write_part(1, columns())
    with pytest.raises(UserError, match="finished store with other content"):
        writer.finish(1)
    with pytest.raises(UserError, match="other settings"):
        StoreWriter(store.path, ROLLOUTS, {}).finish(2)
    assert writer.finish(2) == store
    assert {p.name: p.read_bytes() for p in store.path.iterdir()} == before
