"""Callback that measures response tokens per second of a training stage."""

from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..data.batching import RolloutBatch


class Throughput(Callback):
    """Callback that logs `throughput/tokens_per_second` at the end of each training epoch.

    The value is the number of valid response tokens of all finished optimiser steps, over all
    ranks, divided by the seconds spent training since the stage began. Validation is not counted,
    nor is the time during which an interrupted stage was not running. Nothing is logged before the
    first optimiser step has finished.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._resumed_at = 0.0

    # Not on_train_epoch_start: Lightning leaves that out when it resumes in the middle of an epoch.
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resumed_at = perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        now = perf_counter()
        self.seconds += now - self._resumed_at
        self._resumed_at = now
        if batch.last:  # its count covers every rank and micro-batch, without a sync
            self.tokens += batch.step_tokens

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resumed_at = perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.tokens:  # the same on every rank, so all of them take part in the mean
            rate = self.tokens / self.seconds
            pl_module.log("throughput/tokens_per_second", rate, sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens = state_dict["tokens"]
        self.seconds = state_dict["seconds"]
