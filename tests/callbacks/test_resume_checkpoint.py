"""Checkpoints that training goes on from: which one, and none that is damaged."""

from pathlib import Path

import pytest
import torch

from erpd_lightning.callbacks import ResumeCheckpoint
from erpd_lightning.errors import UserError


def save(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save({"weight": torch.arange(64.0), "global_step": 4}, folder / name)
    return folder / name


def test_no_folder_and_no_checkpoint(tmp_path: Path) -> None:
    assert ResumeCheckpoint(tmp_path / "none", 1).latest() is None
    assert ResumeCheckpoint(tmp_path, 1).latest() is None


def test_the_latest_by_steps_and_no_stray_file(tmp_path: Path) -> None:
    for name in ("step=9.ckpt", "step=10.ckpt", "step=11.ckpt.partial"):
        save(tmp_path, name)
    for name in ("step=x.ckpt", "step=12.ckpt.txt", "step=-13.ckpt", "hpc_ckpt_99.ckpt", "step=.ckpt"):
        (tmp_path / name).write_text("stray")
    assert ResumeCheckpoint(tmp_path, 1).latest() == tmp_path / "step=10.ckpt"


def test_a_folder_in_the_place_of_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, "step=9.ckpt")
    (tmp_path / "step=10.ckpt").mkdir()
    with pytest.raises(UserError, match=r"step=10\.ckpt is a folder, where a checkpoint is expected"):
        ResumeCheckpoint(tmp_path, 1).latest()


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_checkpoint_that_was_cut_short(tmp_path: Path, size: int) -> None:
    path = save(tmp_path, "step=4.ckpt")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"step=4\.ckpt is damaged .*: delete this file alone"):
        ResumeCheckpoint(tmp_path, 1).latest()


def test_an_altered_byte_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, "step=4.ckpt")
    content, refused = path.read_bytes(), 0
    for position in range(0, len(content), 3):
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        try:
            latest = ResumeCheckpoint(tmp_path, 1).latest()
        except UserError:
            refused += 1
            continue
        assert latest is not None
        loaded = torch.load(latest, weights_only=True)
        assert torch.equal(loaded["weight"], torch.arange(64.0)), position
        assert loaded["global_step"] == 4
    assert refused > 64 * 4 / 3
