"""The smallest run of the whole chain: what it overrides in configs/demo.yaml, as command-line arguments.

One round with every stage, of a few optimiser steps each, on prompts of one operation: about 5 s after the imports
on one thread. The base policy has learned the format and little else, which is enough for groups with correct and
incorrect answers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"

SMALL: dict[str, Any] = {
    "rounds": 1,
    "task.operations": 1,
    "task.train_prompts": 32,
    "task.validation_prompts": 8,
    "task.demonstrations": 4096,
    "task.misconceived": 0.2,
    "task.hidden_size": 16,
    "task.layers": 1,
    "task.epochs": 1,
    "task.batch_size": 64,
    "task.learning_rate": 0.03,
    "data.prompts_per_round": 16,
    "data.group_size": 8,
    "data.batch_size": 32,
    "data.validation_samples": 2,
    "data.calibration_prompts": 4,
    "data.sampler.max_new_tokens": 8,
    "extreme_region.learning_rate": 0.003,
    "extreme_region.warmup_steps": 0,
    "extreme_region_trainer.max_epochs": 2,
    "unlearned_trainer.max_epochs": 1,
    "distill.kl_budget": 0.01,
    "distill.warmup_steps": 0,
    "distill_trainer.max_epochs": 2,
    "trainer.enable_progress_bar": False,
    "checkpoint_every": 2,
}


def arguments(run_dir: Path, command: str = "fit", /, **overrides: Any) -> list[str]:
    """Arguments for `python -m erpd_lightning`: the smallest run, with more overrides by dotted name."""
    settings = {**SMALL, "run_dir": run_dir, **overrides}
    return [command, f"--config={DEMO}", *(f"--{key}={value}" for key, value in settings.items())]


@contextmanager
def parsers_built_once() -> Iterator[None]:
    """Building them takes longer than parsing, and they depend on nothing that a test changes."""
    from erpd_lightning.cli.main import ERPDCLI

    built: dict[str, Any] = {}
    setup_parser = ERPDCLI.setup_parser

    def once(self: ERPDCLI, *args: Any) -> None:
        if not built:
            setup_parser(self, *args)
            names = ("parser", "_subcommand_parsers", "_subcommand_method_arguments")
            built.update({name: getattr(self, name) for name in names})
        vars(self).update(built)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ERPDCLI, "setup_parser", once)
        yield
