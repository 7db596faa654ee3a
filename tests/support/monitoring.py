"""What each of two processes sees of the callbacks that watch a run.

`test_collapse` and `test_sample_table` start this file with a key of `SEEN` (see `processes.py`), and call the same
functions themselves for what one process sees.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from torch import Tensor
from torch.utils.data import DataLoader

from erpd_lightning.callbacks import CollapseMonitor, Limit, SampleTable
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samplers import TransformersSampler
from erpd_lightning.modules.extreme_region import ExtremeRegionModule
from erpd_lightning.modules.training import TrainingDiverged
from support.processes import See, fork_ranks
from support.trainers import make_trainer
from support.verifiers import Short

Batch = dict[str, Tensor]


def micro_batch(seed: int, lengths: Sequence[int], shift: float = 0.0) -> Batch:
    """Made-up values of responses of some lengths; what is outside the mask is anything but harmless."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(*lengths, 1))[None] < torch.tensor(lengths)[:, None]
    poison = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.arange(mask.numel()) % 3].reshape(mask.shape)

    def values(scale: float, mean: float) -> Tensor:
        return torch.where(mask, mean + scale * torch.randn(mask.shape, generator=generator), poison)

    return {
        "mask": mask,
        "log_ratio": values(1.0, shift),
        "entropy": values(0.1, 0.5),
        "logp": values(0.3, -1.0),
        "rewards": (torch.arange(len(lengths)) % 2).float(),
    }


class Scripted(LightningModule):
    """A user's module that knows nothing of this library: it returns what its batches hold.

    Args:
        validated: What it logs in each validation, by name; not reduced over ranks.
    """

    def __init__(self, validated: Sequence[Mapping[str, float]] = ()) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.validated = list(validated)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return {**batch, "loss": 0 * self.weight}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        for name, value in self.validated.pop(0).items():
            self.log(name, torch.tensor(value))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Notes(DummyLogger):
    """What a logger is given."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.logged.append((step, dict(metrics)))

    def steps(self, prefix: str = "collapse/") -> list[tuple[int | None, dict[str, float]]]:
        """What was logged of a callback, without the time that it took."""
        found = [
            (step, {name: value for name, value in logged.items() if name.startswith(prefix) and "seconds" not in name})
            for step, logged in self.logged
        ]
        return [entry for entry in found if entry[1]]


def watch(
    batches: Sequence[Batch],
    *callbacks: Callback,
    processes: int = 1,
    accumulate: int = 1,
    epochs: int = 1,
    validated: Sequence[Mapping[str, float]] = (),
    **settings: Any,
) -> tuple[Trainer, Notes]:
    """Train a `Scripted` module on micro-batches in their order."""
    notes = Notes()
    trainer = make_trainer(
        *callbacks,
        processes=processes,
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        logger=notes,
        log_every_n_steps=1,
        use_distributed_sampler=False,
    )
    loader: Any = DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]
    empty: Any = DataLoader([0], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(Scripted(validated), loader, empty if validated else None, **settings)
    return trainer, notes


STEPS: list[list[list[Batch]]] = [
    [
        [micro_batch(10 * step + 2 * rank, lengths[0]), micro_batch(10 * step + 2 * rank + 1, lengths[1])]
        for rank, lengths in enumerate(by_rank)
    ]
    for step, by_rank in enumerate(
        [
            [([4, 2], [1, 5, 3]), ([7, 1], [0, 0])],  # the last one is a dummy micro-batch
            [([1, 1], [2, 2]), ([9, 8], [7])],
            [([3, 1], [0]), ([0, 0], [0])],  # one rank has no token at all
        ]
    )
]
"""Optimiser steps of two micro-batches on each of two ranks, of unequal numbers of tokens."""


def uneven(processes: int) -> dict[str, Any]:
    """What is logged of `STEPS`, and the rows of the table."""
    monitor = CollapseMonitor()
    if processes == 1:
        batches = [batch for step in STEPS for of_rank in step for batch in of_rank]
    else:
        batches = [batch for step in STEPS for batch in step[int(os.environ["LOCAL_RANK"])]]
    _, notes = watch(batches, monitor, processes=processes, accumulate=4 // processes)
    return {"logged": notes.steps(), "rows": monitor.rows}


def decisions(processes: int) -> dict[str, Any]:
    """Where a run ends in which the last rank alone sees what has to stop it."""
    sees = int(os.environ.get("LOCAL_RANK", "0")) == processes - 1
    harmless, far, broken = (micro_batch(0, [4, 2], shift) for shift in (0.0, 9.0, torch.nan))
    seen: dict[str, Any] = {}
    steps = [harmless, far if sees else harmless, harmless, harmless]
    low = [{"val/entropy_per_token": 0.01 if sees and epoch == 1 else 0.7} for epoch in range(4)]
    for name, batches, validated in (("tokens", steps, ()), ("validation", [harmless], low)):
        monitor = CollapseMonitor(
            {
                "collapse/max_log_ratio": Limit(max=5.0, action="stop"),
                "val/entropy_per_token": Limit(min=0.1, action="stop"),
            }
        )
        trainer, _ = watch(batches, monitor, processes=processes, epochs=4, validated=validated)
        seen[name] = {"steps": trainer.global_step, "reasons": monitor.reasons}
    for name, batches, validated in (
        ("nan in tokens", [harmless, broken if sees else harmless], ()),
        ("nan in validation", [harmless], [{"val/distinct": torch.nan if sees else 0.5}]),
    ):
        try:
            watch(batches, CollapseMonitor(), processes=processes, validated=validated)
        except TrainingDiverged as error:
            seen[name] = str(error)
    return seen


def collapse(folder: Path, processes: int) -> dict[str, Any]:
    """All that there is to see of `CollapseMonitor`."""
    return {"uneven": uneven(processes), "decisions": decisions(processes)}


def fit(
    folder: Path,
    *callbacks: Callback,
    processes: int = 1,
    epochs: int = 2,
    logger: Logger | bool = False,
    sampler: TransformersSampler | None = None,
    ckpt_path: Path | None = None,
    validated: bool = True,
    **settings: Any,
) -> ExtremeRegionModule:
    """Train a policy for some epochs, each of which ends with a validation."""
    data = RolloutDataModule(
        folder / "rollouts",
        folder / "base",
        validation_prompts=folder / "prompts.jsonl" if validated else None,
        sampler=sampler or TransformersSampler(max_new_tokens=6, batch_size=4),
        verifier=Short(),
        validation_samples=2,
        batch_size=7,
    )
    module = ExtremeRegionModule(folder / "base", **{"learning_rate": 1e-3, "warmup_steps": 0, **settings})
    trainer = make_trainer(*callbacks, processes=processes, max_epochs=epochs, logger=logger, log_every_n_steps=1)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module


def weights(module: ExtremeRegionModule) -> Tensor:
    """All parameters, flat."""
    return torch.cat([parameter.detach().flatten() for parameter in module.policy.parameters()])


@contextlib.contextmanager
def printing() -> Iterator[io.StringIO]:
    """What is printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        yield printed


def samples(folder: Path, processes: int) -> dict[str, Any]:
    """What is printed with `SampleTable`, and the weights with it and without it."""
    with printing() as printed:
        shown = fit(folder, SampleTable(prompts=3, every_n_validations=1), processes=processes)
    return {"printed": printed.getvalue(), "with": weights(shown), "without": weights(fit(folder, processes=processes))}


SEEN: dict[str, See] = {"collapse": collapse, "samples": samples}


if __name__ == "__main__":
    sys.exit(fork_ranks(SEEN[sys.argv[2]], Path(sys.argv[1])))
