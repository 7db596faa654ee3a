"""Checkpoints that a killed run goes on from, bit for bit."""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from ..errors import UserError, first_line
from ..processes import run_process
from .preemption import stop_agreed

CHECKPOINT = re.compile(r"step=(\d+)\.ckpt")


class ResumeCheckpoint(Checkpoint):
    """Keeps the latest state of training in a folder, as `step=N.ckpt`.

    It saves every so many optimiser steps and at the end of each epoch, once validation has had its say, but never
    between a step and the validation that follows it: Lightning skips that validation when it resumes from there,
    and with it what a module learns by it. A checkpoint appears whole or not at all (Lightning moves it over from
    the system's temporary directory, which takes a while between file systems), and only then the earlier one goes.
    Where a signal asks for the end of the run, it also saves after the step that is being made, and ends the run.

    Args:
        folder: Where the checkpoints lie, and nothing else.
        every_n_steps: Optimiser steps between checkpoints within an epoch.
    """

    def __init__(self, folder: str | Path, every_n_steps: int) -> None:
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self._steps = 0

    def latest(self) -> Path | None:
        """The checkpoint with the most steps, or None if there is none; files of other names do not count.

        Raises:
            UserError: If it is damaged.
        """
        steps = {path: int(found[1]) for path in self._checkpoints() if (found := CHECKPOINT.fullmatch(path.name))}
        latest = max(steps, key=lambda path: steps[path], default=None)
        if latest is not None:
            check_checkpoint(latest)
        return latest

    def _checkpoints(self) -> list[Path]:
        """What was saved here, parts of a save that was killed included."""
        found = self.folder.iterdir() if self.folder.is_dir() else []
        return [path for path in found if CHECKPOINT.fullmatch(path.name.removesuffix(".partial"))]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self._steps = trainer.global_step > self._steps, trainer.global_step
        due = stepped and self._steps % self.every_n_steps == 0
        stops = stepped and stop_agreed(trainer)
        follows = _validation_follows(trainer, batch_idx)
        if (due or stops) and not follows:
            self._save(trainer)
        if stops:
            run_process.stop()
        if stepped and follows:
            run_process.deferring = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        run_process.deferring = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run_process.deferring = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        run_process.deferring = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run_process.deferring = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        path = self.folder / f"step={trainer.global_step}.ckpt"
        partial = path.with_name(path.name + ".partial")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            partial.replace(path)
            for other in self._checkpoints():
                if other != path:
                    trainer.strategy.remove_checkpoint(other)
        trainer.strategy.barrier()


def check_checkpoint(path: Path) -> None:
    """Refuse a checkpoint that is damaged.

    `torch.save` writes a checksum of every tensor, which `torch.load` does not look at: an altered tensor would be
    loaded without a word.

    Raises:
        UserError: Names the checkpoint, and what to do.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, where a checkpoint is expected: move it away, the run did not make it")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            torch.load(path, map_location="meta", mmap=True, weights_only=True)  # It reads what describes the tensors.
    except Exception as error:  # A damaged archive raises errors of many kinds.
        problem = first_line(error)
    else:
        if damaged is None:
            return
        problem = f"{damaged} in it is not what was saved"
    raise UserError(
        f"{path} is damaged ({problem}): delete this file alone, and the stage is trained again from an older "
        "checkpoint, or from its start"
    )


def _validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the epoch ends with this batch or validation is due after it, as it is when training is to stop."""
    batches = batch_idx if trainer.check_val_every_n_epoch is not None else trainer.fit_loop.total_batch_idx
    interval = trainer.val_check_batch
    return trainer.should_stop or trainer.is_last_batch or (interval is not None and (batches + 1) % interval == 0)
