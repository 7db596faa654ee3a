"""The gradient of a step does not depend on how the step was cut: processes, micro-batches, uneven tokens."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_worker import MODULES, Watch, main
from lightning.pytorch import Trainer
from tiny import make_rows, save_policy, write_rollouts

from erpd_lightning import ExtremeRegionModule, RolloutDataModule

WORKER = Path(__file__).with_name("gradient_worker.py")
Seen = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base policy, rollouts of unequal length, and scores of three policies on them."""
    folder = tmp_path_factory.mktemp("gradients")
    for seed, name in enumerate(("base", "teacher", "unlearned")):
        save_policy(folder / name, seed=seed)
    write_rollouts(folder / "rollouts", make_rows(groups=3, group_size=3))
    data = RolloutDataModule(
        store=folder / "rollouts", scores=folder / "signal", tokenizer=folder / "base"
    )
    for name in ("base", "teacher", "unlearned"):
        trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
        module = ExtremeRegionModule(folder / name)
        trainer.predict(module, datamodule=data.scoring(name), return_predictions=False)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """The whole step in one process and one micro-batch."""
    output = tmp_path_factory.mktemp("whole")
    main(folder, output, 1, 4096)
    seen: Seen = torch.load(output / "rank-0.pt", weights_only=True)
    assert all(len(module["batches"]) == 1 for module in seen.values())
    return seen


def in_processes(folder: Path, output: Path, devices: int, max_tokens: int) -> list[Seen]:
    command = [sys.executable, str(WORKER), str(folder), str(output), str(devices), str(max_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [torch.load(output / f"rank-{r}.pt", weights_only=True) for r in range(devices)]


def assert_same_step(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["steps"] == expected["steps"] == 1
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-7)
    assert found["gradient"].keys() == expected["gradient"].keys()
    largest = max(float(gradient.abs().max()) for gradient in expected["gradient"].values())
    assert largest > 1e-4  # Otherwise the comparison below would say little.
    for name, gradient in expected["gradient"].items():
        torch.testing.assert_close(found["gradient"][name], gradient, rtol=1e-5, atol=1e-6 * largest)


def test_micro_batches_add_up(folder: Path, whole: Seen, tmp_path: Path) -> None:
    main(folder, tmp_path, 1, 32)
    seen: Seen = torch.load(tmp_path / "rank-0.pt", weights_only=True)
    for name in MODULES:
        tokens = {count for count, _ in seen[name]["batches"]}
        assert len(seen[name]["batches"]) > 2
        assert len(tokens) > 1  # Micro-batches of unequal token counts: a mean of means would differ.
        assert_same_step(seen[name], whole[name])


@pytest.mark.parametrize("max_tokens", [4096, 24])
def test_two_processes_add_up(folder: Path, whole: Seen, tmp_path: Path, max_tokens: int) -> None:
    first, second = in_processes(folder, tmp_path, 2, max_tokens)
    for name in MODULES:
        batches = [first[name]["batches"], second[name]["batches"]]
        assert len(batches[0]) == len(batches[1])
        assert sum(tokens for tokens, _ in batches[0]) != sum(tokens for tokens, _ in batches[1])
        rows = sum(count for rank in batches for _, count in rank)
        assert rows == sum(count for _, count in whole[name]["batches"])
        assert_same_step(first[name], whole[name])
        assert_same_step(second[name], whole[name])


def test_more_pieces_than_responses_leave_fillers(
    folder: Path, whole: Seen, tmp_path: Path
) -> None:
    """With fewer responses than pieces some micro-batches are empty, and the gradient is the same."""
    data = RolloutDataModule(
        store=folder / "rollouts", tokenizer=folder / "base", batch_size=64, max_tokens=4096
    )
    watch = Watch()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        accumulate_grad_batches=16,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )
    trainer.fit(ExtremeRegionModule(folder / "base"), datamodule=data)
    assert len(watch.batches) == 16
    assert any(rows == 0 for _, rows in watch.batches)
    found = {
        "gradient": watch.gradient,
        "loss": float(trainer.callback_metrics["train/loss"]),
        "steps": trainer.global_step,
    }
    assert_same_step(found, whole["sapo"])
