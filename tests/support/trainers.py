"""Trainers for tests: a quiet one, and as much of one as predictions and data loaders ask for."""

from types import SimpleNamespace
from typing import Any

from lightning.pytorch import Callback, Trainer

from erpd_lightning.data.predict_data import PredictToStore, predict_to_store


def make_trainer(*callbacks: Callback, **settings: Any) -> Trainer:
    """A real one on the CPU that writes nothing, neither to the disk nor to the terminal."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
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
        accumulate_grad_batches=1,
        limit_train_batches=1.0,
        fast_dev_run=False,
        state=SimpleNamespace(fn=None),
    )


def run_prediction(data: PredictToStore, module: Any, rank: int = 0, world_size: int = 1) -> None:
    """Write this rank's parts of a store, and finish it on rank 0."""
    module.configure_model()

    def predict(batch: Any) -> Any:
        return module.predict_step(batch.to(module.device), 0)

    predict_to_store(data, module, predict, fake_trainer(rank, world_size))
