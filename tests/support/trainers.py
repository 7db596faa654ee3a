"""Trainers for tests: a quiet one, and as much of one as predictions and data loaders ask for."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint

from erpd_lightning.data.predict_data import PredictToStore, predict_to_store
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.store import Store
from erpd_lightning.modules.policy_module import PolicyModule


def make_trainer(*callbacks: Callback, processes: int = 1, **settings: Any) -> Trainer:
    """A real one on the CPU that writes nothing beyond its callbacks, neither to the disk nor to the terminal."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": processes,
        "strategy": "ddp" if processes > 1 else "auto",
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "callbacks": [*callbacks],
    }
    return Trainer(**{**defaults, **settings})


def fake_trainer(rank: int = 0, world_size: int = 1) -> Any:
    """As much of a trainer as predictions and data loaders ask for, on one of several ranks."""
    return SimpleNamespace(
        distributed_sampler_kwargs={"rank": rank, "num_replicas": world_size},
        is_global_zero=rank == 0,
        current_epoch=0,
        strategy=SimpleNamespace(barrier=lambda *_: None),
        precision_plugin=SimpleNamespace(predict_step_context=nullcontext),
        accumulate_grad_batches=1,
        limit_train_batches=1.0,
        val_check_interval=1.0,
        check_val_every_n_epoch=1,
        fast_dev_run=False,
        state=SimpleNamespace(fn=None),
    )


def run_prediction(data: PredictToStore, policy: Path | str, rank: int = 0, world_size: int = 1) -> None:
    """Let a policy write this rank's parts of a store, and finish it on rank 0."""
    module = make_predictor(policy)

    def predict(batch: Any) -> Any:
        return module.predict_step(batch.to(module.device), 0)

    predict_to_store(data, module, predict, fake_trainer(rank, world_size))


def make_predictor(policy: Path | str) -> PolicyModule:
    """A module with its policy, for predictions."""
    module = PolicyModule(policy, references={})
    module.configure_model()
    return module


def score(data: RolloutDataModule, name: str, policy: Path | str) -> Store:
    """Let a policy score the stored rollouts under a name; returns the finished store."""
    run_prediction(data.scoring(name), policy)
    assert data.scores is not None
    return Store.open(data.scores / name)
