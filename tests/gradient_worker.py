"""One optimiser step of each module on stored rollouts; run by `test_distributed`, in one process or in several.

    python gradient_worker.py FOLDER OUTPUT DEVICES MAX_TOKENS
"""

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from erpd_lightning import DistillModule, ExtremeRegionModule, RolloutDataModule

MODULES: dict[str, tuple[type, dict[str, Any]]] = {
    "sapo": (ExtremeRegionModule, {}),
    "sapo with KL": (ExtremeRegionModule, {"kl_coef": 0.5}),
    "unlearned": (ExtremeRegionModule, {"sign": -1}),
    "distill": (DistillModule, {"kl_budget": 0.05}),
}


class Watch(Callback):
    """What a step is made of: its gradient as the optimizer sees it, its logged loss, its micro-batches."""

    def __init__(self) -> None:
        self.gradient: dict[str, Tensor] = {}
        self.batches: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, out: Any, batch: Any, *_: Any) -> None:
        self.batches.append((int(batch.mask.sum()), int((batch.rows >= 0).sum())))

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        parameters = module.policy.named_parameters()
        self.gradient = {name: p.grad.clone() for name, p in parameters if p.grad is not None}


def step(folder: Path, name: str, devices: int, max_tokens: int) -> dict[str, Any]:
    """One epoch of one step with the module called `name`."""
    kind, kwargs = MODULES[name]
    data = RolloutDataModule(
        store=folder / "rollouts",
        scores=folder / "signal",
        tokenizer=folder / "base",
        batch_size=64,
        max_tokens=max_tokens,
    )
    watch = Watch()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(kind(folder / "base", **kwargs), datamodule=data)
    return {
        "gradient": watch.gradient,
        "loss": float(trainer.callback_metrics["train/loss"]),
        "batches": watch.batches,
        "steps": trainer.global_step,
    }


def main(folder: Path, output: Path, devices: int, max_tokens: int) -> None:
    """Write what each rank saw to a file of its own."""
    torch.set_num_threads(1)
    found = {name: step(folder, name, devices, max_tokens) for name in MODULES}
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    torch.save(found, output / f"rank-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
