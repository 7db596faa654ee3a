"""Asking a policy something in the middle of its training, without a trace."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng


@contextmanager
def eval_mode(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Evaluation mode, in the trainer's precision; afterwards random state and the mode of every part are as before."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with isolate_rng(), trainer.precision_plugin.val_step_context():
            yield
    finally:
        for part, training in modes:
            part.training = training
