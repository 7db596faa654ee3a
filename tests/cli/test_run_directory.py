"""Run directories of another configuration, and damaged ones."""

import inspect
import shutil
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
from support.command_line import Run, digests


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--distill.kl_budget=0.02", "round-1/distill was made with distill.kl_budget: 0.01, not 0.02"),
        ("--seed_everything=1", "prepare was made with seed_everything: 0, not 1"),
        ("--task.layers=2", "prepare was made with task.layers: 1, not 2"),
        ("--data.group_size=4", "round-1/rollouts was made with data.group_size: 8, not 4"),
        (
            "--data.sampler.temperature=0.5",
            "round-1/rollouts was made with data.sampler.init_args.temperature: 1.0, not 0.5",
        ),
        (
            "--extreme_region_trainer.max_epochs=3",
            "round-1/extreme_region was made with extreme_region_trainer.max_epochs: 2, not 3",
        ),
        ("--data.baseline=batch", "round-1/extreme_region was made with data.baseline: group, not batch"),
        ("--unlearned.kl_coef=0.1", "round-1/unlearned was made with unlearned.kl_coef: 0.0, not 0.1"),
        ("--data.calibration_prompts=3", "round-1/distill was made with data.calibration_prompts: 4, not 3"),
        ("--data.validation_samples=3", "round-1/evaluation/base was made with data.validation_samples: 2, not 3"),
    ],
)
def test_a_run_directory_of_another_configuration(
    finished: tuple[Path, str], refused: Run, given: str, expected: str
) -> None:
    before = digests(finished[0])
    assert refused(*arguments(finished[0]), given).startswith(f"{finished[0]}/{expected}. Give another run_dir")
    assert digests(finished[0]) == before


def test_settings_that_make_no_difference_are_not_compared(finished: tuple[Path, str], run: Run) -> None:
    more = ["--trainer.log_every_n_steps=2", "--trainer.enable_progress_bar=true", "--data.max_tokens=9999"]
    more += ["--extreme_region.objective=erpd_lightning.SAPO"]  # the same class by another name
    assert run(*arguments(finished[0]), *more).count("done already") == 10


@pytest.mark.parametrize(
    ("store", "damage"),
    [("rollouts", "altered"), ("rollouts", "truncated"), ("scoring/base", "lost"), ("scoring/unlearned", "altered")],
)
def test_a_damaged_store(refused: Run, copy: Callable[..., Path], store: str, damage: str) -> None:
    run_dir = copy("distill", "evaluation")
    part = run_dir / "round-1" / store / "part-00000.parquet"
    content = part.read_bytes()
    middle = len(content) // 2
    if damage == "altered":
        part.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "truncated":
        part.write_bytes(content[:-50])
    else:
        part.unlink()
    expected = f"{part} is missing" if damage == "lost" else f"{part} was altered or truncated"
    assert refused(*arguments(run_dir)).startswith(expected)
    assert not (run_dir / "round-1" / "distill").exists()


def test_a_record_that_is_none(refused: Run, copy: Callable[..., Path]) -> None:
    record = copy() / "round-1" / "scoring" / "stage.json"
    record.write_text(record.read_text()[:40])
    assert refused(*arguments(record.parents[2])).startswith(f"{record} is no readable record of a stage")


@pytest.mark.parametrize("damage", ["altered", "truncated", "lost"])
@pytest.mark.parametrize(
    ("policy", "stage"),
    [
        ("base", "prepare"),
        ("round-1/extreme_region/teacher", "round-1/extreme_region"),
        ("round-1/unlearned/policy", "round-1/unlearned"),
        ("round-1/distill/student", "round-1/distill"),
    ],
)
def test_a_policy_that_is_not_the_one_that_was_made(
    refused: Run, copy: Callable[..., Path], policy: str, stage: str, damage: str
) -> None:
    run_dir = copy()
    weights = run_dir / policy / "model.safetensors"
    content = weights.read_bytes()
    if damage == "lost":
        shutil.rmtree(run_dir / policy)
    else:
        weights.write_bytes(content[:-4] + bytes(4) if damage == "altered" else content[:-4])
    made_by = {"base": "base", "teacher": "extreme_region", "policy": "unlearned", "student": "distill"}
    for command in (["fit"], ["test", f"--stage={made_by[weights.parent.name]}"]):
        message = refused(*arguments(run_dir, command[0]), *command[1:])
        assert message.startswith(str(weights.parent))
    message = refused(*arguments(run_dir))
    assert f"delete {run_dir / stage / 'stage.json'}" in message


def test_a_policy_without_a_record_is_not_measured(refused: Run, copy: Callable[..., Path]) -> None:
    run_dir = copy()
    (run_dir / "round-1" / "distill" / "stage.json").unlink()
    assert "has no record" in refused(*arguments(run_dir, "test"))


def test_what_the_advice_makes_again_is_the_same(run: Run, copy: Callable[..., Path]) -> None:
    run_dir = copy()
    weights = run_dir / "round-1" / "distill" / "student" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4])
    (run_dir / "round-1" / "distill" / "stage.json").unlink()
    run(*arguments(run_dir))
    assert weights.read_bytes() == content


def test_samples_that_are_lost(refused: Run, copy: Callable[..., Path]) -> None:
    run_dir = copy()
    (run_dir / "round-1" / "evaluation" / "student" / "samples.parquet").unlink()
    assert "samples.parquet is missing: delete " in refused(*arguments(run_dir))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rounds": 3}', "\x00\xff"])
def test_a_damaged_summary_is_written_again(run: Run, copy: Callable[..., Path], text: str) -> None:
    summary = copy() / "summary.json"
    content = summary.read_text()
    summary.write_text(text)
    run(*arguments(summary.parent))
    assert summary.read_text() == content


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seconds": 1}', "\x00"])
def test_a_damaged_record_is_named_and_nothing_else_is_to_go(
    refused: Run, copy: Callable[..., Path], text: str
) -> None:
    record = copy() / "round-1" / "evaluation" / "student" / "stage.json"
    record.write_text(text)
    for command in ("fit", "preview"):
        message = refused(*arguments(record.parents[3], command))
        assert message.startswith(f"{record} is no ")
        assert message.endswith("Delete this file alone: the stage goes on from what it has made, which is kept")


# What a result depends on


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
