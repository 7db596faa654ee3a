"""Lightning's side of the signals that end a run: its own handlers are kept out, and ranks agree on when to stop."""

import torch
from lightning.pytorch import Trainer

from ..processes import run_process


def take_over_signals(trainer: Trainer) -> None:
    """Keep Lightning's handlers from replacing those of the run, and remember the processes that the trainer starts."""
    if run_process.handling:
        vars(trainer._signal_connector)["register_signal_handlers"] = lambda: None
        if trainer.strategy.launcher is not None:
            run_process.launches(trainer.strategy.launcher)


def stop_agreed(trainer: Trainer) -> bool:
    """Whether any rank is to stop; call it on every rank."""
    flag = torch.tensor(float(run_process.received is not None), device=trainer.strategy.root_device)
    return bool(trainer.strategy.reduce(flag, reduce_op="sum") > 0)
