"""What each of two processes sees of training steps, validation and a gradient that is not finite.

`test_distributed` starts this file (see `processes.py`), and calls the same functions itself for what one process
sees.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from erpd_lightning.budget.search import Measurement
from erpd_lightning.callbacks import BudgetExceeded, KLBudget
from erpd_lightning.data.batching import RolloutBatch
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samplers import TransformersSampler
from erpd_lightning.modules.distill import DistillModule
from erpd_lightning.modules.evaluation import EvaluationModule, EvaluationWithSamples
from erpd_lightning.modules.extreme_region import ExtremeRegionModule
from erpd_lightning.modules.policy_module import PolicyModule
from erpd_lightning.modules.training import TrainingDiverged
from erpd_lightning.objectives.extreme import CrossEntropy
from erpd_lightning.objectives.regression import SquaredError
from support import trainers
from support.processes import fork_ranks
from support.verifiers import Short

STILL: dict[str, Any] = {"learning_rate": 1e-30, "warmup_steps": 0}
"""Weights that do not move, so that every step compares with the same step elsewhere."""

MODULES: dict[str, Callable[[Path], PolicyModule]] = {
    "sapo": lambda folder: ExtremeRegionModule(folder / "base", **STILL),
    "sapo with kl": lambda folder: ExtremeRegionModule(
        folder / "teacher", references={"base": str(folder / "base")}, kl_coef=0.3, **STILL
    ),
    "unlearned": lambda folder: ExtremeRegionModule(folder / "base", sign=-1, **STILL),
    "cross-entropy": lambda folder: ExtremeRegionModule(folder / "base", objective=CrossEntropy(), **STILL),
    "a term a response with kl": lambda folder: ExtremeRegionModule(
        folder / "teacher", references={"base": str(folder / "base")}, objective=SquaredError(), kl_coef=30, **STILL
    ),
    "distill": lambda folder: DistillModule(folder / "base", kl_budget=0.05, **STILL),
}

CUTS: dict[str, dict[str, int]] = {
    "as few micro-batches as there can be": {"accumulate": 1, "max_tokens": 1000},
    "two micro-batches": {"accumulate": 2, "max_tokens": 1000},
    "three micro-batches": {"accumulate": 3, "max_tokens": 1000},
    "small micro-batches": {"accumulate": 1, "max_tokens": 24},
}

BATCHES = {"several batches": 4, "one batch": 64}
"""Responses that are sampled at a time in validation: with one batch the second process has none."""


class Watch(Callback):
    """Notes every optimiser step.

    Attributes:
        gradients: As the optimizer gets them, flat.
        logged: The step's values, as loggers get them.
        tokens: Of each micro-batch, 0 for a dummy.
    """

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.logged: list[dict[str, float]] = []
        self.tokens: list[int] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for p in module.policy.parameters()]))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.tokens.append(int(batch.mask.sum()))
        if trainer.global_step > len(self.logged):
            metrics = trainer.callback_metrics.items()
            self.logged.append({name: float(value) for name, value in metrics if name.startswith("train/")})


def make_trainer(processes: int, *callbacks: Callback, **settings: Any) -> Trainer:
    """A trainer that does nothing beyond one epoch."""
    return trainers.make_trainer(
        *callbacks, processes=processes, **{"max_epochs": 1, "limit_val_batches": 0, **settings}
    )


def steps(folder: Path, module: PolicyModule, processes: int, accumulate: int, max_tokens: int) -> dict[str, Any]:
    """What `Watch` notes in an epoch of several steps, the last of them small, and the epoch's own values."""
    data = RolloutDataModule(
        folder / "rollouts",
        folder / "base",
        scores=folder / "scores",
        batch_size=7,
        max_tokens=max_tokens,
    )
    watch = Watch()
    trainer = make_trainer(processes, watch, accumulate_grad_batches=accumulate)
    trainer.fit(module, datamodule=data)
    epoch = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"gradients": watch.gradients, "logged": watch.logged, "tokens": watch.tokens, "epoch": epoch}


def held_out(folder: Path, batch_size: int) -> RolloutDataModule:
    """Held-out prompts, and how they are answered."""
    return RolloutDataModule(
        folder / "rollouts",
        folder / "base",
        validation_prompts=folder / "prompts.jsonl",
        sampler=TransformersSampler(max_new_tokens=6, batch_size=batch_size),
        verifier=Short(),
        validation_samples=2,
    )


def validation(folder: Path, processes: int, batch_size: int) -> dict[str, float]:
    """What validation says of a policy that is far from its base."""
    module = EvaluationModule(folder / "teacher", references={"base": str(folder / "base")})
    trainer = make_trainer(processes, limit_val_batches=1.0)
    trainer.validate(module, datamodule=held_out(folder, batch_size), verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def samples_file(folder: Path, processes: int, batch_size: int) -> Path:
    """Where the responses lie that a test keeps."""
    return folder / f"samples-{processes}-{batch_size}.parquet"


def keep(folder: Path, processes: int, batch_size: int) -> None:
    """Test that policy, and keep its responses."""
    references = {"base": str(folder / "base")}
    module = EvaluationWithSamples(folder / "teacher", references, samples_file(folder, processes, batch_size))
    make_trainer(processes).test(module, datamodule=held_out(folder, batch_size), verbose=False)


class Broken(ExtremeRegionModule):
    """Its second step is not finite, on one process alone."""

    def batch_loss(self, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
        terms, values = super().batch_loss(batch)
        return terms * (torch.nan if (self.global_step, self.global_rank) == (1, 1) else 1.0), values


def divergence(folder: Path, processes: int) -> dict[str, Any]:
    """Where a run ends that meets a gradient that is not finite, and with which weights."""
    module = Broken(folder / "base", learning_rate=1e-3, warmup_steps=0)
    watch = Watch()
    trainer = make_trainer(processes, watch)
    data = RolloutDataModule(folder / "rollouts", folder / "base", batch_size=7)
    message = None
    try:
        trainer.fit(module, datamodule=data)
    except TrainingDiverged as error:
        message = str(error)
    weights = torch.cat([p.detach().flatten() for p in module.policy.parameters()])
    return {"message": message, "steps": trainer.global_step, "weights": weights}


class OneSees(KLBudget):
    """The second step is outside the budget, on one process alone."""

    def _measure(self, trainer: Any, module: Any, purpose: str, stderr: float = math.inf) -> Measurement:
        return Measurement(2.0 if (trainer.global_step, trainer.global_rank) == (2, 1) else 0.5, 0.0)


def budgets(folder: Path, processes: int) -> dict[str, Any]:
    """A KL that each process measures on its own prompts, and where training ends that one sees overrun."""

    def fit(budget: KLBudget) -> Trainer:
        data = RolloutDataModule(
            folder / "rollouts",
            folder / "base",
            validation_prompts=folder / "prompts.jsonl",
            sampler=TransformersSampler(max_new_tokens=6, batch_size=4),
            batch_size=7,
        )
        trainer = make_trainer(processes, budget)
        module = ExtremeRegionModule(folder / "teacher", references={"base": str(folder / "base")}, **STILL)
        try:
            trainer.fit(module, datamodule=data)
        except BudgetExceeded:
            budget.reasons.append("exceeded")
        return trainer

    watched, one = KLBudget(100.0, every_n_steps=2), OneSees(1.0, action="stop", every_n_steps=1)
    fit(watched)
    assert watched.last is not None
    steps = fit(one).global_step
    return {"measured": [watched.last.kl, watched.last.stderr], "steps": steps, "reasons": one.reasons}


def see(folder: Path, processes: int) -> dict[str, Any]:
    """All that there is to see."""
    seen: dict[str, Any] = {
        f"{name}, {cut}": steps(folder, make(folder), processes, **how)
        for name, make in MODULES.items()
        for cut, how in CUTS.items()
    }
    seen.update({name: validation(folder, processes, size) for name, size in BATCHES.items()})
    seen["budgets"] = budgets(folder, processes)
    for size in BATCHES.values():
        keep(folder, processes, size)
    if processes > 1:
        seen["divergence"] = divergence(folder, processes)
    return seen


if __name__ == "__main__":
    sys.exit(fork_ranks(see, Path(sys.argv[1])))
