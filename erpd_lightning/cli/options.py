"""The options of data, modules and trainers, their defaults, and what of them the chain fills in."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from ..data.evaluation_sets import EvaluationSet
from ..data.rollouts import RolloutDataModule
from ..modules.distill import DistillModule
from ..modules.extreme_region import ExtremeRegionModule

CLASSES = {
    "data": RolloutDataModule,
    "extreme_region": ExtremeRegionModule,
    "distill": DistillModule,
    "trainer": Trainer,
}

BOUND_BY_CHAIN = {
    "data": {
        "store",
        "tokenizer",
        "scores",
        "replay_stores",
        "on_policy_store",
        "round",
        "preview_prompts",
        "seed",
    },
    "extreme_region": {"policy", "references", "sign", "dtype"},
    "distill": {"policy", "references", "policies", "dtype"},
    "trainer": {"default_root_dir", "enable_checkpointing"},
}
"""Arguments that the chain fills in, stage by stage."""

DEFAULTS = {
    "data.sampler": {"class_path": "erpd_lightning.data.samplers.TransformersSampler"},
    "data.verifier": {"class_path": "erpd_lightning.data.verifiers.MathVerify"},
    "extreme_region.objective": {"class_path": "erpd_lightning.objectives.extreme.SAPO"},
    "distill.signal": {
        "class_path": "erpd_lightning.objectives.signal.Signal",
        "init_args": {"terms": [{"numerator": "teacher", "denominator": "unlearned"}]},
    },
    "distill.objective": {"class_path": "erpd_lightning.objectives.distillation.TiltedTarget"},
    "trainer.num_sanity_val_steps": 0,
    "trainer.enable_model_summary": False,
    "trainer.gradient_clip_val": 1.0,
    "trainer.log_every_n_steps": 1,
}
"""What the classes default to anyway, spelt out so that it shows and can be overridden, and the trainer's."""

DEFAULT_EPOCHS = {"extreme_region": 8, "unlearned": 1, "distill": 4}
"""The stages that train, each with trainer settings of its own, and their epochs where none of these says how long."""


def add_options(parser: LightningArgumentParser) -> None:
    """The options of data, modules and trainers; all stay configuration until a stage begins."""
    for group, target in CLASSES.items():
        parser.add_class_arguments(
            target,
            group,
            skip=set(BOUND_BY_CHAIN[group]),
            instantiate=False,
            fail_untyped=False,
            sub_configs=True,
        )
    parser.set_defaults(DEFAULTS)
    parser.add_argument(
        "--unlearned",
        type=dict[str, Any] | None,
        default=None,
        help="Settings of the unlearned policy that differ from those of extreme_region.",
    )
    parser.add_argument(
        "--teachers",
        type=dict[str, dict[str, Any]] | None,
        default=None,
        help="Further policies to train on the rollouts of each round, by the name that signals give them: settings "
        "that differ from those of extreme_region; sign: -1 for an unlearned one; trainer for settings of the trainer "
        "that differ from extreme_region_trainer.",
    )
    parser.add_argument(
        "--evaluation.sets",
        type=dict[str, EvaluationSet] | None,
        default=None,
        help="Sets that policies are evaluated on beside the held-out prompts, by name: prompts, and as they differ "
        "from those of the rollouts samples, temperature, top_p, top_k, max_new_tokens and verifier; max_prompts for "
        "the first ones alone.",
    )
    parser.add_argument(
        "--evaluation.policies",
        type=list[str] | None,
        default=None,
        help="Policies of a round that are evaluated: base, teacher, unlearned, those of teachers, student, which "
        "always is; null for all.",
    )
    for stage, epochs in DEFAULT_EPOCHS.items():
        parser.add_argument(
            f"--{stage}_trainer",
            type=dict[str, Any] | None,
            default=None,
            help=f"Trainer settings of the stage {stage} that differ from the shared ones "
            "(any key of --trainer, such as max_epochs, callbacks or logger). "
            f"Without max_epochs, max_steps and max_time it trains for {epochs} epoch{'s' * (epochs > 1)}.",
        )


def option_names(parser: LightningArgumentParser) -> set[str]:
    """The dotted names of a parser's options as they are given on the command line."""
    keys = (key.replace(".init_args", "") for key, _ in parser.get_defaults().items())
    return {key.removesuffix(".class_path") for key in keys}


def class_options(parser: LightningArgumentParser) -> set[str]:
    """Those whose value is a class by default: below them are its arguments, not further options."""
    keys = (key.replace(".init_args", "") for key, _ in parser.get_defaults().items())
    return {key.removesuffix(".class_path") for key in keys if key.endswith(".class_path")}


def bound_keys() -> set[str]:
    """The dotted names of what the chain fills in."""
    return {f"{group}.{name}" for group, names in BOUND_BY_CHAIN.items() for name in names}
