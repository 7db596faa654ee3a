"""What of the settings a stage's result depends on."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

from erpd_lightning.cli.dependencies import (
    CALIBRATION_DATA_KEYS,
    CONTENT_DATA_KEYS,
    OPERATIONAL_TRAINER_KEYS,
    TRAINING_TRAINER_KEYS,
    UNUSED_DATA_KEYS,
    VALIDATION_DATA_KEYS,
    VALIDATION_TRAINER_KEYS,
    affects_outcome,
    data_settings,
    trainer_settings,
)
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.pipeline.rounds import Rounds
from support.chain import arguments


@pytest.mark.parametrize(
    ("given", "option", "old", "new"),
    [
        ("--extreme_region.keep=best", "data.calibration_samples", 2, 3),
        ("--extreme_region.keep=best", "data.max_validation_prompts", 8, 7),
        ("--extreme_region.stop_at_kl=0.1", "data.validation_samples", 2, 3),
        ("--extreme_region.stop_at_kl=0.1", "trainer.limit_val_batches", 5, 4),
        (
            '--extreme_region_trainer={"max_epochs": 2, "callbacks": '
            '[{"class_path": "erpd_lightning.callbacks.KLBudget", "init_args": {"budget": 0.05}}]}',
            "data.validation_samples",
            2,
            3,
        ),
    ],
)
def test_what_is_measured_counts_where_weights_are_chosen_by_it(
    chain: Callable[..., Rounds], tmp_path: Path, given: str, option: str, old: int, new: int
) -> None:
    def recorded(value: int, *more: str) -> Any:
        return chain(*arguments(tmp_path, **{option: value}), *more).builder.settings("extreme_region")

    assert recorded(old) == recorded(new)
    assert recorded(old, given) != recorded(new, given)


class Throughput(Callback):
    """A user's own, which is called like one that only monitors."""


@pytest.mark.parametrize(
    ("class_path", "counts"),
    [
        ("erpd_lightning.callbacks.Throughput", False),
        ("lightning.pytorch.callbacks.LearningRateMonitor", False),
        ("lightning.pytorch.callbacks.EarlyStopping", True),
        (f"{__name__}.Throughput", True),
    ],
)
def test_a_callback_counts_unless_it_is_known_to_monitor(class_path: str, counts: bool) -> None:
    assert affects_outcome({"class_path": class_path}) == counts


@pytest.mark.parametrize(
    ("class_path", "counts"),
    [
        ("lightning.pytorch.plugins.MixedPrecision", True),
        ("lightning.pytorch.plugins.environments.SLURMEnvironment", False),
        ("lightning.pytorch.plugins.io.TorchCheckpointIO", False),
    ],
)
def test_a_plugin_counts_where_it_changes_what_is_computed(class_path: str, counts: bool) -> None:
    plugin = {"class_path": class_path, "init_args": {}}
    trainer = {"callbacks": None, **dict.fromkeys(VALIDATION_TRAINER_KEYS)}
    for module in (None, {"keep": "last"}):
        for plugins in (plugin, [plugin]):
            with_it = trainer_settings("distill", {**trainer, "plugins": plugins}, module)
            assert (with_it != trainer_settings("distill", {**trainer, "plugins": None}, module)) == counts


def test_an_option_that_is_new_counts_in_every_stage() -> None:
    data = {"iterations": 1, "new": 1}
    trainer = {"callbacks": None, "new": 1, **dict.fromkeys(VALIDATION_TRAINER_KEYS)}
    for stage in ("rollouts", "scoring", "signal_selection", "evaluation", "extreme_region", "teachers.a", "distill"):
        for watched in (False, True):
            assert data_settings(stage, data, {"iterations": 1}, watched)["new"] == 1
        trains = stage in ("extreme_region", "teachers.a", "distill")
        assert trainer_settings(stage, trainer, {"keep": "last"} if trains else None)["new"] == 1


def test_all_that_does_not_count_is_an_option() -> None:
    """What was renamed must not be listed under its old name: the new one would count where it should not."""
    options = {*inspect.signature(RolloutDataModule).parameters}
    assert options >= CONTENT_DATA_KEYS.union(*UNUSED_DATA_KEYS.values(), VALIDATION_DATA_KEYS, CALIBRATION_DATA_KEYS)
    assert {*inspect.signature(Trainer).parameters} >= OPERATIONAL_TRAINER_KEYS | TRAINING_TRAINER_KEYS
