"""From the configuration to modules, data and trainers: options, defaults, and what each stage depends on."""

from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger

from ..callbacks import KLBudget
from ..data.rollouts import RolloutDataModule
from ..errors import UserError
from ..modules.distill import UNRESTRAINED, DistillModule
from ..modules.extreme_region import ExtremeRegionModule
from ..modules.policy_module import PolicyModule
from ..objectives.signal import AutoSignal
from ..pipeline.stages import is_teacher, teacher_stage
from .errors import naming, readable

CLASSES = {
    "data": RolloutDataModule,
    "extreme_region": ExtremeRegionModule,
    "distill": DistillModule,
    "trainer": Trainer,
}

BOUND_BY_CHAIN = {
    "data": {"store", "tokenizer", "scores", "earlier", "fresh", "round", "preview_prompts", "seed"},
    "extreme_region": {"policy", "references", "sign"},
    "distill": {"policy", "references", "policies"},
    "trainer": {"default_root_dir", "enable_checkpointing"},
}
"""Arguments that the chain fills in, stage by stage."""

DEFAULTS = {
    "data.sampler": {"class_path": "erpd_lightning.data.samplers.TransformersSampler"},
    "data.verifier": {"class_path": "erpd_lightning.data.verifiers.ExactMatch"},
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

EPOCHS = {"extreme_region": 8, "unlearned": 1, "distill": 4}
"""The stages that train, each with trainer settings of its own, and their epochs where none of these says how long."""

STAGES = tuple(EPOCHS)

OPERATIONAL = {
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

WATCHING = {
    "DeviceStatsMonitor",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "RichModelSummary",
    "RichProgressBar",
    "SampleTable",
    "TQDMProgressBar",
    "Throughput",
}
"""Callbacks that do the same; of any other, such as `EarlyStopping` or `KLBudget`, the outcome may depend."""

SAMPLED = ("sampler", "verifier", "group_size", "prompts_per_round")
"""What of `data` the rollouts depend on."""

COMPARED = ("replay", "baseline")
"""What of `data` teacher and unlearned policy depend on besides the rollouts."""

ANSWERED = ("sampler", "group_size", "prompts_per_round")
"""What of `data` a student depends on that answers the prompts itself."""

NOT_TRAINED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "rollouts": (SAMPLED, ("precision",)),
    "signal": ((), ("precision",)),
    "evaluation": (
        ("sampler", "verifier", "validation_samples", "max_validation_prompts"),
        ("precision", "limit_test_batches", "fast_dev_run"),
    ),
}
"""Stages that train nothing: what of `data` and of `trainer` their result depends on."""

CALIBRATION = {
    "data": ("sampler", "calibration_prompts", "calibration_samples"),
    "trainer": ("check_val_every_n_epoch", "val_check_interval", "limit_val_batches"),
}
"""What a student depends on that other trained policies do not: beta is corrected in validation."""

POLICIES = {"base", "teacher", "unlearned"}
"""What the chain scores beside the policies of `teachers`, hence what a signal can be made of."""

TEACHER_ONLY = {"sign", "trainer"}
"""What a policy of `teachers` has beside the settings of extreme_region."""

MISTAKES = (MisconfigurationException, ValueError, TypeError, ImportError)
"""What a class raises that does not like its arguments."""


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
    for stage, epochs in EPOCHS.items():
        parser.add_argument(
            f"--{stage}_trainer",
            type=dict[str, Any] | None,
            default=None,
            help=f"Trainer settings of the stage {stage} that differ from the shared ones "
            "(any key of --trainer, such as max_epochs, callbacks or logger). "
            f"Without max_epochs, max_steps and max_time it trains for {epochs} epoch{'s' * (epochs > 1)}.",
        )


def options(parser: LightningArgumentParser) -> set[str]:
    """The dotted names of a parser's options as they are given on the command line."""
    defaults = parser.get_defaults()
    keys = (key.replace(".init_args", "") for key, _ in defaults.items())
    return {key for key in keys if not key.endswith(".class_path")}


class ConfigBuilder:
    """Makes modules, data and trainers from the configuration; new ones each time it is asked.

    Args:
        config: The parsed configuration.
        parser: The parser that it came from.
    """

    def __init__(self, config: Namespace, parser: LightningArgumentParser) -> None:
        self.config = config
        self.parser = parser
        self._merged: dict[str, Namespace] = {}
        for group in CLASSES:
            if not isinstance(config[group], Namespace):
                raise UserError(f"{group} is {config[group]!r}: its options are expected there")
        self.teachers: dict[str, dict[str, Any]] = config.get("teachers") or {}
        for name in self.teachers:
            if name in {*POLICIES, "first", "student"} or not name.isidentifier():
                raise UserError(f"teachers.{name}: a policy of its own needs a name of its own, letters and digits")

    def check(self) -> None:
        """Build everything once, so that a mistake shows before any work is done.

        Raises:
            UserError: Names the key that is wrong.
        """
        data = self.data(store="", tokenizer="")
        policies = POLICIES | self.teachers.keys()
        for stage in (*map(teacher_stage, self.teachers), *STAGES):
            module = self.module(stage, policy="")
            trainer = self.trainer(stage)
            epochs = trainer.max_epochs or -1
            shared_out = epochs > 0 and epochs % module.iterations == 0
            tried = self._settings("trainer", trainer_of(stage))["fast_dev_run"]
            if module.iterations > 1 and not (shared_out or tried):
                raise UserError(
                    f"{stage}_trainer.max_epochs is {epochs}: it must be a multiple of {stage}.iterations "
                    f"({module.iterations}), each of which is trained on for as many epochs"
                )
            if module.pass_at_k is not None and module.pass_at_k > data.validation_samples:
                raise UserError(
                    f"{stage}.pass_at_k is {module.pass_at_k}, but data.validation_samples is only "
                    f"{data.validation_samples}"
                )
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, KLBudget):
                    callback.fresh_kl.check_reference(_references(module))
            if isinstance(module, ExtremeRegionModule):
                module.check_rollouts(data)
            data.check_groups(module, f"{stage}.objective")
            if isinstance(module, DistillModule) and (unknown := {*module.signal.policies} - policies):
                raise UserError(
                    f"distill.signal: no policy is called {', '.join(sorted(unknown))}; "
                    f"there are {', '.join(sorted(policies))}"
                )
            if isinstance(module, DistillModule):
                self._check_preview(module, data)
            if isinstance(module, DistillModule) and (unused := self.teachers.keys() - {*module.signal.policies}):
                raise UserError(f"teachers.{min(unused)} is trained in vain: distill.signal does not use it")
            if isinstance(module, DistillModule) and module.unrestrained and data.calibration_prompts == 0:
                raise UserError(UNRESTRAINED)

    def _check_preview(self, module: DistillModule, data: RolloutDataModule) -> None:
        held_out = module.signal.prompts if isinstance(module.signal, AutoSignal) else 0
        if data.prompts_per_round is not None and held_out >= data.prompts_per_round:
            raise UserError(
                f"distill.signal holds out {held_out} prompts for previews, but data.prompts_per_round is only "
                f"{data.prompts_per_round}"
            )

    def data(self, **bound: Any) -> RolloutDataModule:
        """See `stages.Builder`."""
        return RolloutDataModule(**{**self._arguments("data", "data"), **bound})

    def module(self, stage: str, **bound: Any) -> PolicyModule:
        """See `stages.Builder`."""
        kind = DistillModule if stage == "distill" else ExtremeRegionModule
        if kind is ExtremeRegionModule:
            bound = {"sign": self._sign(stage), **bound}
        try:
            return kind(**{**self._arguments(_group(stage), stage), **bound})
        except UserError as error:
            message = str(error).removeprefix("extreme_region.")
            raise UserError(message if f"{stage}." in message else f"{stage}.{message}") from error

    def trainer(self, stage: str, kind: type[Trainer] = Trainer, **bound: Any) -> Trainer:
        """See `stages.Builder`; the `kind` is `Trainer` or a subclass that takes the same arguments."""
        own = trainer_of(stage)
        kwargs = self._arguments("trainer", own)
        root = bound.get("default_root_dir")
        if kwargs["logger"] in (None, True) and root is not None:
            kwargs["logger"] = CSVLogger(root, name="metrics")
        elif root is not None and "logger" not in self._changed(own):
            _told_apart(kwargs["logger"], Path(root))
        callbacks = kwargs["callbacks"] or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if stage == "base":  # They may stop it, or ask for rollouts and validation, which demonstrations are not.
            callbacks = []
        kwargs["callbacks"] = [*callbacks, *bound.pop("callbacks", [])]
        saves = any(isinstance(callback, Checkpoint) for callback in kwargs["callbacks"])
        if stage == "base":  # The task says how it is trained.
            defaults = vars(self.parser.get_defaults()["trainer"])
            kwargs = {key: value if key in OPERATIONAL else defaults[key] for key, value in kwargs.items()}
        endless = all(kwargs[key] in (None, -1) for key in ("max_epochs", "max_steps", "max_time"))
        if endless and (stage in EPOCHS or is_teacher(stage)):
            bound = {"max_epochs": EPOCHS.get(stage, EPOCHS["extreme_region"]), **bound}
        if stage in ("rollouts", "signal"):  # Other stages build on these: part of a store is none.
            bound = {"fast_dev_run": False, "limit_predict_batches": None, **bound}
        try:
            return kind(**{**kwargs, "enable_checkpointing": saves, **bound})
        except MISTAKES as error:
            key = own if self._changed(own) else "trainer"
            raise UserError(f"{key}: {readable(error)}") from error

    def settings(self, stage: str) -> dict[str, Any]:
        """See `stages.Builder`."""
        data = _canonical(self.config["data"].as_dict())
        own_trainer = trainer_of(stage)
        of_data: tuple[str, ...]
        trainer = self._settings("trainer", own_trainer).as_dict()
        if stage == "choice":
            of_data, distill = ("sampler", "verifier"), _canonical(self.config["distill"].as_dict())
            own = {"distill": {key: distill[key] for key in ("signal", "kl_budget")}}
        elif stage in NOT_TRAINED:
            of_data, of_trainer = NOT_TRAINED[stage]
            own = {"trainer": {key: trainer[key] for key in of_trainer}}
        else:
            calibration = CALIBRATION if stage == "distill" else {"data": (), "trainer": ()}
            sampled: tuple[str, ...] = ("iterations", *SAMPLED) if data["iterations"] > 1 else ()
            if stage == "distill" and self.config["distill"]["iterations"] > 1:
                sampled = ANSWERED
            elif stage != "distill":
                sampled = (*sampled, *COMPARED)
            of_data = ("batch_size", *sampled, *calibration["data"])
            ignored = OPERATIONAL.difference(calibration["trainer"])
            own = {
                stage: _canonical(self._settings(_group(stage), stage).as_dict()),
                own_trainer: {key: value for key, value in trainer.items() if key not in ignored},
            }
            if acting := _acting(trainer["callbacks"]):
                own[own_trainer]["callbacks"] = acting
            if is_teacher(stage):
                own[stage]["sign"] = self._sign(stage)
        return {**own, "data": {key: data[key] for key in of_data}}

    def built(self, key: str, value: Any, name: str | None = None) -> Any:
        """The value of an option with its classes instantiated.

        Raises:
            UserError: If a class does not like its arguments; calls the option by its `name`.
        """
        if not isinstance(value, Namespace | list | dict):
            return value
        try:
            return self.parser.instantiate(Namespace({key: value}))[key]
        except MISTAKES as error:
            raise UserError(naming(name or key, readable(error))) from error

    def _arguments(self, group: str, own: str) -> dict[str, Any]:
        """The arguments of a group's class, with the classes among them instantiated."""
        changed = self._changed(own)
        return {
            name: self.built(f"{group}.{name}", value, f"{own if name in changed else group}.{name}")
            for name, value in vars(self._settings(group, own)).items()
        }

    def _settings(self, group: str, own: str) -> Namespace:
        """A group's settings with a stage's `own` over them, checked like the group's.

        Raises:
            UserError: Names the key that is wrong.
        """
        if own not in self._merged:
            self._merged[own] = self._merge(group, own)
        return self._merged[own].clone()

    def _merge(self, group: str, own: str) -> Namespace:
        shared, changed = self.config[group], self._changed(own)
        if own == group or not changed:
            return shared
        try:
            return self.parser.parse_object({group: dict(changed)}, Namespace({group: shared.clone()}))[group]
        except ArgumentError as error:
            known = {key for key in options(self.parser) if key.startswith(f"{group}.")}
            bound = {f"{group}.{name}" for name in BOUND_BY_CHAIN[group]}
            raise UserError(readable(error, known, bound).replace(f"{group}.", f"{own}.")) from error

    def _changed(self, own: str) -> dict[str, Any]:
        """What the user set under a key of a stage's own."""
        if not is_teacher(own):
            return dict(self.config.get(own) or {})
        _, name, *trainer = own.split(".")
        settings = self.teachers[name]
        if trainer:
            return {**self._changed(trainer_of("extreme_region")), **settings.get("trainer", {})}
        return {key: value for key, value in settings.items() if key not in TEACHER_ONLY}

    def _sign(self, stage: str) -> int:
        if is_teacher(stage):
            sign: int = self.teachers[stage.removeprefix("teachers.")].get("sign", 1)
            return sign
        return -1 if stage == "unlearned" else 1


def trainer_of(stage: str) -> str:
    """The key of a stage's trainer settings."""
    return f"{stage}.trainer" if is_teacher(stage) else f"{stage}_trainer"


def _group(stage: str) -> str:
    """Where a stage's settings are; some stages have only those that differ from another's."""
    return "extreme_region" if stage == "unlearned" or is_teacher(stage) else stage


def _references(module: PolicyModule) -> list[str]:
    """The policies that the chain gives a module to measure the KL to."""
    two = isinstance(module, DistillModule) and module.total_budget is not None
    return [*module.references, "first"] if two else list(module.references)


def _told_apart(loggers: Any, folder: Path) -> None:
    """Give loggers that all stages share, and that the user gave no prefix, the stage's: its steps begin at 0 again."""
    stage = folder.parts[next((i for i, part in enumerate(folder.parts) if part.startswith("round-")), -1) :]
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if getattr(logger, "_prefix", None) == "":
            logger._prefix = "/".join(stage)


def _acting(callbacks: Any) -> list[Any]:
    """The settings of callbacks that do more than watch."""
    listed = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    return [_canonical(each) for each in listed if each["class_path"].rpartition(".")[2] not in WATCHING]


def _canonical(settings: Any) -> Any:
    """Nested settings in which every class has one name, whichever of its import paths the user gave."""
    if not isinstance(settings, dict):
        return settings
    named = {key: _canonical(value) for key, value in settings.items()}
    if "class_path" in named:
        module, _, name = named["class_path"].rpartition(".")
        found = getattr(import_module(module), name)
        named["class_path"] = f"{found.__module__}.{found.__qualname__}"
    return named
