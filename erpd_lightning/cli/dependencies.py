"""What each stage's result depends on, of the user's settings: recorded with it, and compared when a run goes on.

What does not count is listed: an option that is new, here or in Lightning, counts.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment

OPERATIONAL_TRAINER_KEYS = {
    "accelerator",
    "strategy",
    "devices",
    "num_nodes",
    "logger",
    "callbacks",
    "profiler",
    "log_every_n_steps",
    "check_val_every_n_epoch",
    "val_check_interval",
    "limit_val_batches",
    "limit_test_batches",
    "limit_predict_batches",
    "num_sanity_val_steps",
    "enable_progress_bar",
    "enable_model_summary",
    "plugins",
    "enable_autolog_hparams",
}
"""Trainer settings that change how a stage runs and is watched, but not what it makes; of callbacks and plugins see
`affects_outcome` and `changes_numbers`."""

TRAINING_TRAINER_KEYS = {
    "max_epochs",
    "min_epochs",
    "max_steps",
    "min_steps",
    "max_time",
    "limit_train_batches",
    "overfit_batches",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "fast_dev_run",
    "deterministic",
    "benchmark",
    "inference_mode",
    "use_distributed_sampler",
    "detect_anomaly",
    "barebones",
    "sync_batchnorm",
    "reload_dataloaders_every_n_epochs",
    "model_registry",
}
"""Those that only training depends on."""

VALIDATION_TRAINER_KEYS = {"check_val_every_n_epoch", "val_check_interval", "limit_val_batches"}
"""Those that say when a policy is validated, and on how much."""

MONITORING_CALLBACKS = {
    "DeviceStatsMonitor",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "RichModelSummary",
    "RichProgressBar",
    "SampleTable",
    "SamplingProgress",
    "TQDMProgressBar",
    "Throughput",
}
"""Callbacks that do the same; of any other, such as `EarlyStopping` or `KLBudget`, the outcome may depend."""

CONTENT_DATA_KEYS = {"prompts", "validation_prompts", "imported", "max_tokens", "audit_warn", "audit_stop"}
"""What of `data` never counts: prompts and imported responses are told apart by what is in them, which is an input of
the stages; how much is run through a policy at a time, and what is warned of, changes nothing."""

ROLLOUT_DATA_KEYS = {"group_size", "prompts_per_round"}
"""What of `data` the rollouts depend on beside sampler and verifier; other stages have the rollouts themselves as an
input."""

TRAINING_DATA_KEYS = {"batch_size", "iterations", "replay", "baseline"}
"""What of `data` only training depends on; `correct_threshold` is also what evaluation counts by."""

VALIDATION_DATA_KEYS = {"validation_samples", "max_validation_prompts", "max_evaluation_prompts"}
CALIBRATION_DATA_KEYS = {"calibration_prompts", "calibration_samples"}

UNUSED_DATA_KEYS: dict[str, set[str]] = {
    "rollouts": {*TRAINING_DATA_KEYS, "correct_threshold", *VALIDATION_DATA_KEYS, *CALIBRATION_DATA_KEYS},
    "scoring": {
        *ROLLOUT_DATA_KEYS,
        *TRAINING_DATA_KEYS,
        *VALIDATION_DATA_KEYS,
        *CALIBRATION_DATA_KEYS,
        "sampler",
        "verifier",
        "judge_truncated",
        "correct_threshold",
    },
    "signal_selection": {
        *ROLLOUT_DATA_KEYS,
        *TRAINING_DATA_KEYS,
        *VALIDATION_DATA_KEYS,
        *CALIBRATION_DATA_KEYS,
    },
    "evaluation": {*ROLLOUT_DATA_KEYS, *TRAINING_DATA_KEYS, *CALIBRATION_DATA_KEYS, "max_validation_prompts"},
    # The set's own sampling and verifier are recorded beside it.
    "evaluation_set": {
        *ROLLOUT_DATA_KEYS,
        *TRAINING_DATA_KEYS,
        *VALIDATION_DATA_KEYS,
        *CALIBRATION_DATA_KEYS,
        "sampler",
        "verifier",
    },
}
"""Stages that train nothing: what of `data` their result does not depend on."""

TARGET_DISTILL_KEYS = {"signal", "kl_budget"}
"""What of `distill` the choice of a signal depends on: it ends before anything is distilled."""


def data_settings(stage: str, data: Mapping[str, Any], distill: Mapping[str, Any], watched: bool) -> dict[str, Any]:
    """The settings of `data` that a stage's result depends on.

    Args:
        stage: The stage.
        data: All settings of `data`.
        distill: Settings of `distill`.
        watched: Whether a training stage's result depends on what is measured while it trains; see `is_watched`.
    """
    unused = UNUSED_DATA_KEYS.get(stage)
    if unused is None:
        unused = _unused_in_distillation(distill, watched) if stage == "distill" else _unused_in_region(data, watched)
    return {key: value for key, value in data.items() if key not in CONTENT_DATA_KEYS | unused}


def _unused_in_region(data: Mapping[str, Any], watched: bool) -> set[str]:
    unused = set() if watched else VALIDATION_DATA_KEYS | CALIBRATION_DATA_KEYS
    if data["iterations"] == 1:
        unused = unused | ROLLOUT_DATA_KEYS
        if not watched:
            unused = unused | {"sampler", "verifier", "judge_truncated"}
    return unused


def _unused_in_distillation(distill: Mapping[str, Any], watched: bool) -> set[str]:
    """A student's KL is measured on calibration prompts anyway; its own answers are not verified."""
    unused = TRAINING_DATA_KEYS - {"batch_size"}
    if not watched:
        unused = unused | VALIDATION_DATA_KEYS | {"verifier", "judge_truncated", "correct_threshold"}
    return unused if distill["iterations"] > 1 else unused | ROLLOUT_DATA_KEYS


def is_watched(module: Mapping[str, Any], trainer: Mapping[str, Any]) -> bool:
    """Whether what a training stage makes depends on what is measured while it trains.

    Args:
        module: Settings of the stage's module.
        trainer: What of its trainer's settings counts.
    """
    return module.get("keep") == "best" or module.get("stop_at_kl") is not None or "callbacks" in trainer


def trainer_settings(stage: str, trainer: Mapping[str, Any], module: Mapping[str, Any] | None) -> dict[str, Any]:
    """The trainer's settings that a stage's result depends on.

    Args:
        stage: The stage.
        trainer: All settings of its trainer.
        module: Settings of the stage's module; None where the stage trains nothing.
    """
    if module is None:
        ignored = OPERATIONAL_TRAINER_KEYS | TRAINING_TRAINER_KEYS
        if stage in ("evaluation", "evaluation_set"):
            ignored = ignored - {"limit_test_batches", "fast_dev_run"}
        return {key: value for key, value in trainer.items() if key not in ignored} | _acting_plugins(trainer)
    settings = {key: value for key, value in trainer.items() if key not in OPERATIONAL_TRAINER_KEYS}
    callbacks = trainer["callbacks"] or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    if acting := [canonical_class_paths(each) for each in callbacks if affects_outcome(each)]:
        settings["callbacks"] = acting
    settings |= _acting_plugins(trainer)
    if stage == "distill" or is_watched(module, settings):
        settings |= {key: trainer[key] for key in sorted(VALIDATION_TRAINER_KEYS)}
    return settings


def affects_outcome(callback: Mapping[str, Any]) -> bool:
    """Whether a configured callback may do more than monitor; of another package's, whatever its name, nobody knows."""
    found = class_of(callback["class_path"])
    known = found.__module__.partition(".")[0] in ("erpd_lightning", "lightning")
    return not (known and found.__name__ in MONITORING_CALLBACKS)


def changes_numbers(plugin: Any) -> bool:
    """Whether a configured plugin of a trainer may change what it computes, as one of a precision does."""
    if not isinstance(plugin, Mapping):
        return True
    found = class_of(plugin["class_path"])
    return not (isinstance(found, type) and issubclass(found, ClusterEnvironment | CheckpointIO))


def _acting_plugins(trainer: Mapping[str, Any]) -> dict[str, Any]:
    plugins = trainer.get("plugins") or []
    plugins = plugins if isinstance(plugins, list) else [plugins]
    acting = [canonical_class_paths(plugin) for plugin in plugins if changes_numbers(plugin)]
    return {"plugins": acting} if acting else {}


def canonical_class_paths(settings: Any) -> Any:
    """Nested settings in which every class has one name, whichever of its import paths the user gave.

    Arguments that change nothing of what a class makes (its `operational_arguments`) are left out.
    """
    if not isinstance(settings, dict):
        return settings
    named = {key: canonical_class_paths(value) for key, value in settings.items()}
    if "class_path" in named:
        found = class_of(named["class_path"])
        named["class_path"] = f"{found.__module__}.{found.__qualname__}"
        operational = getattr(found, "operational_arguments", ())
        if operational and named.get("init_args"):
            named["init_args"] = {k: value for k, value in named["init_args"].items() if k not in operational}
    return named


def class_of(class_path: str) -> Any:
    """What lies at an import path."""
    module, _, name = class_path.rpartition(".")
    return getattr(import_module(module), name)
