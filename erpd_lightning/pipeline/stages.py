"""How stages run: skipped when they are done, resumed when they were killed, recorded when they end.

Each stage lives in a directory of its own and ends by writing a `stage.json`, last and atomically. A finished
stage that was made from the same settings and inputs is skipped. One that was killed goes on from its last
checkpoint or its last stored part; since all draws are functions of names (`seeds`), it ends as if nothing had
happened. A stage whose record names other settings is never overwritten: that is an error.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_only

from ..callbacks import ResumeCheckpoint
from ..data.arithmetic import Arithmetic
from ..data.predict_data import PredictToStore
from ..data.rollouts import RolloutDataModule
from ..errors import InvalidArgument, UserError
from ..modules.policy_module import PolicyModule
from ..modules.training import TrainingModule
from ..seeds import derive_seed
from .records import (
    Record,
    check_files,
    check_policy,
    digests_of,
    holds_work,
    read_record,
    write_log_digests,
    write_record,
)


class Builder(Protocol):
    """Makes what a stage needs from the user's settings and what the chain binds."""

    @property
    def teachers(self) -> Mapping[str, Any]:
        """The further policies to train on the rollouts, by name."""

    def data(self, **bound: Any) -> RolloutDataModule:
        """The data module."""

    def module(self, stage: str, **bound: Any) -> TrainingModule:
        """The module of `extreme_region`, `unlearned` or `distill`."""

    def trainer(self, stage: str, **bound: Any) -> Trainer:
        """A trainer with the shared settings, those of the stage over them, and `bound` over both.

        Callbacks in `bound` are added to the configured ones.
        """

    def named(self, stage: str, error: InvalidArgument) -> UserError:
        """The error with the key in front that the argument was given under, for the stage."""

    def settings(self, stage: str) -> Record:
        """What a stage's result depends on, as JSON: recorded, and compared when a run goes on."""


class StageOnly(Exception):
    """The one stage that was asked for is done."""


@dataclass
class Stages:
    """Runs the stages of a run.

    Args:
        builder: Makes data modules, modules and trainers.
        task: The task of the stage `base`; None where its outcome is given.
        rounds: How many rounds the run has.
        checkpoint_every: Optimiser steps between the checkpoints that a killed stage goes on from.
        only: The only stage to run; None for all.
        only_round: The round of that stage; None for the first in which it is not finished.
        seed: Seed of all draws.
        dtype: Data type of the weights of policies that are asked, as in `torch`.
    """

    builder: Builder
    task: Arithmetic | None
    rounds: int
    checkpoint_every: int
    only: str | None
    only_round: int | None
    seed: int
    dtype: str = "float32"

    def __post_init__(self) -> None:
        self.ran = False
        self._found_finished = False

    def fit(
        self,
        stage: str,
        folder: Path,
        module: TrainingModule,
        data: RolloutDataModule,
        **bound: Any,
    ) -> list[str]:
        """Train from the last checkpoint of an earlier attempt, or from the start.

        Returns:
            The `reasons` of the module and of callbacks that have any: what they warned of or stopped for.

        Raises:
            UserError: If an `EarlyStopping` monitors what nobody logs, or nothing was trained.
        """
        saver = ResumeCheckpoint(folder / "checkpoints", self.checkpoint_every)
        trainer = self.builder.trainer(stage, default_root_dir=folder, callbacks=[saver], **bound)
        try:
            trainer.fit(module, datamodule=data, ckpt_path=saver.latest(), weights_only=True)
        except RuntimeError as error:
            if (missing := _missing_metric(error, trainer)) is None:
                raise
            message = f"EarlyStopping: no metric is called {missing}; docs/metrics.md lists those that are logged"
            raise UserError(message) from error
        if trainer.global_step == 0:
            raise UserError(
                f"the stage {stage} ended before its first optimiser step: its policy would be the one that it began "
                "with; give it more time, or callbacks that stop it later"
            )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return [reason for each in (module, *callbacks) for reason in getattr(each, "reasons", [])]

    def predict(self, stage: str, folder: Path, policy: Path | str, data: PredictToStore) -> None:
        """Sample from a policy, or ask it about stored rollouts, into a store."""
        trainer = self.builder.trainer(stage, default_root_dir=folder, logger=False)
        module = PolicyModule(policy, references={}, dtype=self.dtype)
        trainer.predict(module, datamodule=data, return_predictions=False)

    def run(
        self,
        stage: str,
        number: int,
        folder: Path,
        about: str,
        inputs: dict[str, str],
        body: Callable[[], Record],
        policy: Path | str | None = None,
        files: Sequence[Path] = (),
        settings: Record | None = None,
    ) -> Record:
        """Skip a stage that is done, or run it and record it.

        Args:
            stage: The stage.
            number: The round; 0 before the first.
            folder: The stage's directory.
            about: What it does, for the user.
            inputs: Fingerprints of what it is made from.
            body: Does it, and gives its outcome.
            policy: The policy that is there where it is done.
            files: The files that are there where it is done.
            settings: All that its outcome depends on besides; None for what the configuration says of the stage.

        Raises:
            UserError: If the directory was made with other settings or from other inputs, or what the stage made is
                not there any more as it was.
            StageOnly: If this was the only stage to run.
        """
        settings = self._settings(stage) if settings is None else settings
        made_with = {"settings": settings, "inputs": inputs, "seed": self.seed}
        made_with = json.loads(json.dumps(made_with, default=str))
        wanted = self.only == stage and self.only_round in (None, number)
        title = f"[round {number}/{self.rounds}] {stage}" if number else f"[base] {stage}"
        done = read_record(folder / "stage.json", made_with)
        if done is None and self.only is not None and not wanted:
            if self._found_finished:  # A job that is tried again has nothing to do, which is no mistake.
                say(f"--stage {self.only} is finished; what comes next is the stage {stage} in {folder}")
                raise StageOnly
            raise UserError(
                f"--stage {self.only} needs the stage {stage} in {folder}, which is not finished: "
                f"run --stage {stage} first"
            )
        if done is not None:
            if policy is not None:
                check_policy(policy, folder)
            check_files(files, folder)
            say(f"{title}: done already")
            self._found_finished |= wanted
            if wanted and (self.only_round is not None or number == 0) and stage != "evaluation":
                raise StageOnly
            return done
        if holds_work(folder):
            read_record(folder / "started.json", made_with)
        say(f"{title}: {about}")
        write_record(folder / "started.json", made_with)
        seed_everything(derive_seed(self.seed, stage, number) % 2**32, verbose=False)
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            outcome = body()
        except InvalidArgument as error:
            raise self.builder.named(stage, error) from error
        record = {
            "stage": stage,
            "round": number,
            **made_with,
            "seconds": round(time.perf_counter() - wall, 3),
            "cpu_seconds": round(time.process_time() - cpu, 3),
            "versions": _versions(),
            "outcome": outcome,
            "files": digests_of(files, folder),
        }
        write_log_digests(folder)
        write_record(folder / "stage.json", record)
        barrier()
        self.ran = True
        if wanted and stage != "evaluation":
            raise StageOnly
        return record

    def _settings(self, stage: str) -> Record:
        if stage == "base":
            assert self.task is not None
            return {"task": vars(self.task)}
        return self.builder.settings(stage)


def _versions() -> dict[str, str]:
    """Versions of the packages that a result depends on, by name."""
    own = sys.modules[__package__.partition(".")[0]].__version__  # A checkout that is not installed has no metadata.
    return {"erpd_lightning": own, **{name: version(name) for name in ("torch", "lightning", "transformers")}}


def _missing_metric(error: RuntimeError, trainer: Trainer) -> str | None:
    """The metric that an `EarlyStopping` looked for in vain, where that is why the error was raised.

    That it is not logged says nothing alone: it may be about to be, when something else fails.
    """
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    callback = frame.f_locals.get("self")
    if isinstance(callback, EarlyStopping) and callback.strict and callback.monitor not in trainer.callback_metrics:
        return callback.monitor
    return None


def teacher_stage(name: str) -> str:
    """The stage that trains a policy of `teachers`."""
    return f"teachers.{name}"


def is_teacher(stage: str) -> bool:
    """Whether a stage, or its trainer, is that of a policy of `teachers`."""
    return stage.startswith("teachers.")


def barrier() -> None:
    """Wait for the other ranks, where there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


@rank_zero_only
def say(text: str) -> None:
    """Tell the user, once."""
    print(text, flush=True)
