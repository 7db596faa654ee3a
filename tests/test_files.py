"""Files that are written whole or not at all, and disks that are full."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from erpd_lightning import files
from erpd_lightning.data.store import ROLLOUTS, StoreWriter
from erpd_lightning.errors import UserError
from erpd_lightning.files import atomic_write


@pytest.mark.parametrize("data", [b"\x00\xff", "π₀\n", b""])
def test_atomic_write(tmp_path: Path, data: bytes | str) -> None:
    path = tmp_path / "file"
    atomic_write(path, "before")
    atomic_write(str(path), data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_atomic_write_follows_the_umask(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        atomic_write(tmp_path / "file", b"")
    finally:
        os.umask(umask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_what_atomic_write_renames_is_complete_and_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    replace, fsync = os.replace, os.fsync

    def note_fsync(descriptor: int) -> None:
        kind = "directory" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
        events.append(f"fsync {kind}")
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        assert source.parent == target.parent
        events.append(f"rename {source.read_text()}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    atomic_write(tmp_path / "file", "all")
    assert events == ["fsync file", "rename all", "fsync directory"]


def fail(number: int) -> Callable[..., None]:
    def failing(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    return failing


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_the_users_to_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    writer = StoreWriter(tmp_path, ROLLOUTS, {})
    path = tmp_path / "part-00000.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail(number))
        with pytest.raises(UserError, match=f"disk full while writing {path}"):
            writer.write_part(0, {name: [] for name in ROLLOUTS.names})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_disk_that_is_really_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic_write(path, "before")

    def full(*_: object) -> Any:
        return os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb")

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", full, raising=False)
        with pytest.raises(UserError, match=f"disk full while writing {path}"):
            atomic_write(path, b"after" * 10**6)
    assert path.read_text() == "before"


def test_a_full_disk_has_no_room_for_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "mkdir", fail(errno.ENOSPC))
    with pytest.raises(UserError, match=f"disk full while writing {tmp_path / 'store'}"):
        StoreWriter(tmp_path / "store", ROLLOUTS, {})


def test_other_errors_are_not_called_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", fail(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)) as raised:
        atomic_write(tmp_path / "file", b"data")
    assert not isinstance(raised.value, UserError)
    assert list(tmp_path.iterdir()) == []
