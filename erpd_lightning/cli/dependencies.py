"""What each stage's result depends on, of the user's settings: recorded with it, and compared when a run goes on."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

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
"""Trainer settings that change how a stage runs and is watched, but not what it makes."""

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

ROLLOUT_DATA_KEYS = ("sampler", "verifier", "group_size", "prompts_per_round")
"""What of `data` the rollouts depend on."""

ADVANTAGE_DATA_KEYS = ("replay", "baseline", "correct_threshold")
"""What of `data` teacher and unlearned policy depend on besides the rollouts."""

ON_POLICY_DATA_KEYS = ("sampler", "group_size", "prompts_per_round")
"""What of `data` a student depends on that answers the prompts itself."""

INFERENCE_STAGE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "rollouts": (ROLLOUT_DATA_KEYS, ("precision",)),
    "scoring": ((), ("precision",)),
    "evaluation": (
        ("sampler", "verifier", "correct_threshold", "validation_samples", "max_evaluation_prompts"),
        ("precision", "limit_test_batches", "fast_dev_run"),
    ),
    # The set's own settings are recorded beside it.
    "evaluation_set": ((), ("precision", "limit_test_batches", "fast_dev_run")),
}
"""Stages that train nothing: what of `data` and of `trainer` their result depends on."""

CALIBRATION_KEYS = {
    "data": ("sampler", "calibration_prompts", "calibration_samples"),
    "trainer": ("check_val_every_n_epoch", "val_check_interval", "limit_val_batches"),
}
"""What a student depends on that other trained policies do not: beta is corrected in validation."""


SIGNAL_SELECTION_KEYS = {"data": ("sampler", "verifier", "correct_threshold"), "distill": ("signal", "kl_budget")}
"""What of `data` and of `distill` the choice of a signal depends on."""


def data_keys(stage: str, data: Mapping[str, Any], distill: Mapping[str, Any]) -> tuple[str, ...]:
    """What of `data` a stage's result depends on.

    Args:
        stage: The stage.
        data: Settings of `data`.
        distill: Settings of `distill`.
    """
    if stage == "signal_selection":
        return SIGNAL_SELECTION_KEYS["data"]
    if stage in INFERENCE_STAGE_KEYS:
        return INFERENCE_STAGE_KEYS[stage][0]
    own_rollouts: tuple[str, ...] = ("iterations", *ROLLOUT_DATA_KEYS) if data["iterations"] > 1 else ()
    if stage != "distill":
        return ("batch_size", *own_rollouts, *ADVANTAGE_DATA_KEYS)
    if distill["iterations"] > 1:
        own_rollouts = ON_POLICY_DATA_KEYS
    return ("batch_size", *own_rollouts, *CALIBRATION_KEYS["data"])


def trainer_settings(stage: str, trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's settings that a stage's result depends on.

    Args:
        stage: The stage.
        trainer: All settings of its trainer.
    """
    if stage in INFERENCE_STAGE_KEYS:
        return {key: trainer[key] for key in INFERENCE_STAGE_KEYS[stage][1]}
    ignored = OPERATIONAL_TRAINER_KEYS.difference(CALIBRATION_KEYS["trainer"] if stage == "distill" else ())
    settings = {key: value for key, value in trainer.items() if key not in ignored}
    callbacks = trainer["callbacks"] or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    if acting := [canonical_class_paths(each) for each in callbacks if affects_outcome(each)]:
        settings["callbacks"] = acting
    return settings


def affects_outcome(callback: Mapping[str, Any]) -> bool:
    """Whether a configured callback may do more than monitor."""
    return callback["class_path"].rpartition(".")[2] not in MONITORING_CALLBACKS


def canonical_class_paths(settings: Any) -> Any:
    """Nested settings in which every class has one name, whichever of its import paths the user gave."""
    if not isinstance(settings, dict):
        return settings
    named = {key: canonical_class_paths(value) for key, value in settings.items()}
    if "class_path" in named:
        found = class_of(named["class_path"])
        named["class_path"] = f"{found.__module__}.{found.__qualname__}"
    return named


def class_of(class_path: str) -> Any:
    """What lies at an import path."""
    module, _, name = class_path.rpartition(".")
    return getattr(import_module(module), name)
