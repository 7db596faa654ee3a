"""From the configuration to modules, data and trainers."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger

from ..callbacks import KLBudget, SamplingProgress
from ..callbacks.preemption import take_over_signals
from ..data.evaluation_sets import Evaluation, EvaluationSet
from ..data.rollouts import RolloutDataModule
from ..errors import InvalidArgument, UserError, shortened
from ..modules.distill import UNRESTRAINED, DistillModule
from ..modules.extreme_region import ExtremeRegionModule
from ..modules.strategies import check_steps, check_strategy
from ..modules.training import TrainingModule
from ..objectives.signal import AutoSignal
from ..pipeline.stages import is_teacher, teacher_stage
from .dependencies import (
    OPERATIONAL_TRAINER_KEYS,
    TARGET_DISTILL_KEYS,
    UNUSED_DATA_KEYS,
    canonical_class_paths,
    data_settings,
    is_watched,
    trainer_settings,
)
from .errors import one_line, rejected_value, unknown_option, with_key
from .given import unknown_settings
from .instantiate import CONSTRUCTION_ERRORS, instantiate
from .options import BOUND_BY_CHAIN, CLASSES, DEFAULT_EPOCHS, option_names

SCORED_POLICIES = {"base", "teacher", "unlearned"}
"""What the chain scores beside the policies of `teachers`, hence what a signal can be made of."""

TEACHER_ONLY_KEYS = {"sign", "trainer"}
"""What a policy of `teachers` has beside the settings of extreme_region."""

SAMPLING_STAGES = {"rollouts", "evaluation"}
"""Stages that sample and train nothing."""


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
        for name, settings in self.teachers.items():
            if name in {*SCORED_POLICIES, "first", "student"} or not name.isidentifier():
                raise UserError(f"teachers.{name}: a policy of its own needs a name of its own, letters and digits")
            if not isinstance(trainer := settings.get("trainer", {}), dict):
                raise UserError(f"teachers.{name}.trainer is {trainer!r}: options of the trainer are expected there")

    def check(self) -> None:
        """Build everything once, so that a mistake shows before any work is done.

        Raises:
            UserError: Names the key that is wrong.
        """
        data = self.data(store="", tokenizer="")
        for stage in (*map(teacher_stage, self.teachers), *DEFAULT_EPOCHS):
            module = self.module(stage, policy="")
            trainer = self.trainer(stage)
            self._check_lengths(stage, module, trainer, data)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, KLBudget):
                    self._check_kl_budget(callback, module)
            if isinstance(module, ExtremeRegionModule):
                with self.keys_named(stage):
                    module.check_rollouts(data)
            with self.keys_named("data"):
                data.check_groups(module.needs_groups, f"{stage}.objective")
            if isinstance(module, DistillModule):
                self._check_distillation(module, data)

    def check_trainable(self, stages: Iterable[str]) -> None:
        """Whether stages can be trained in the data type and precision that they are given.

        Raises:
            UserError: Names the key that is wrong.
        """
        for stage in stages:
            try:
                self.module(stage, policy="").check_precision(self.trainer(stage))
            except InvalidArgument as error:
                if error.argument != "precision":  # The run's dtype.
                    raise
                own = trainer_of(stage)
                raise error.under(own if "precision" in self._own_settings(own) else "trainer") from error

    def _check_kl_budget(self, callback: KLBudget, module: TrainingModule) -> None:
        try:
            callback.fresh_kl.check_reference(kl_references(module))
        except InvalidArgument as error:
            raise error.under("KLBudget") from error

    def _check_lengths(self, stage: str, module: TrainingModule, trainer: Trainer, data: RolloutDataModule) -> None:
        epochs = trainer.max_epochs or -1
        tried = self._settings("trainer", trainer_of(stage))["fast_dev_run"]
        parts = {f"{_group(stage)}.iterations": module.iterations}
        if stage == "extreme_region":
            parts["data.iterations"] = data.iterations
        for key, iterations in parts.items():
            shared_out = epochs > 0 and epochs % iterations == 0
            if iterations > 1 and not (shared_out or tried):
                raise UserError(
                    f"{trainer_of(stage)}.max_epochs is {epochs}: it must be a multiple of {key} ({iterations}), "
                    "each of which is trained on for as many epochs"
                )
        if module.pass_at_k is not None and module.pass_at_k > data.validation_samples:
            problem = f"is {module.pass_at_k}, but data.validation_samples is only {data.validation_samples}"
            raise InvalidArgument("pass_at_k", problem).under(self._key(stage, "pass_at_k"))

    def _check_distillation(self, module: DistillModule, data: RolloutDataModule) -> None:
        policies = SCORED_POLICIES | self.teachers.keys()
        if unknown := {*module.signal.policies} - policies:
            raise UserError(
                f"distill.signal: no policy is called {', '.join(sorted(unknown))}; "
                f"there are {', '.join(sorted(policies))}"
            )
        held_out = module.signal.prompts if isinstance(module.signal, AutoSignal) else 0
        if data.prompts_per_round is not None and held_out >= data.prompts_per_round:
            raise UserError(
                f"distill.signal holds out {held_out} prompts for previews, but data.prompts_per_round is only "
                f"{data.prompts_per_round}"
            )
        if unused := self.teachers.keys() - {*module.signal.policies}:
            raise UserError(f"teachers.{min(unused)} is trained in vain: distill.signal does not use it")
        if module.unrestrained and data.calibration_prompts == 0:
            raise InvalidArgument("objective.kl_term", UNRESTRAINED).under("distill")

    def data(self, **bound: Any) -> RolloutDataModule:
        """See `stages.Builder`."""
        arguments = self._arguments("data", "data")
        with self.keys_named("data"):
            return RolloutDataModule(**{**arguments, **bound})

    def evaluation(self) -> Evaluation:
        """Which policies are evaluated, and on which sets.

        Raises:
            UserError: Names the key that is wrong.
        """
        given = self.config["evaluation"]
        sets = {name: self._evaluation_set(name, value) for name, value in (given["sets"] or {}).items()}
        try:
            return Evaluation(sets, None if given["policies"] is None else tuple(given["policies"]))
        except InvalidArgument as error:
            raise error.under("evaluation") from error

    def _evaluation_set(self, name: str, given: Any) -> EvaluationSet:
        settings = dict(vars(given))
        for key in ("prompts", "verifier"):  # They are what the data module's are.
            option = {"prompts": "data.validation_prompts"}.get(key, f"data.{key}")
            settings[key] = instantiate(self.parser, option, settings[key], f"evaluation.sets.{name}.{key}")
        try:
            return EvaluationSet(**settings)
        except InvalidArgument as error:
            raise error.under(f"evaluation.sets.{name}") from error

    def module(self, stage: str, **bound: Any) -> TrainingModule:
        """See `stages.Builder`."""
        kind = DistillModule if stage == "distill" else ExtremeRegionModule
        if kind is ExtremeRegionModule:
            bound = {"sign": self._sign(stage), **bound}
        arguments = self._arguments(_group(stage), stage)
        with self.keys_named(stage):
            return kind(**{**arguments, "dtype": self.config["dtype"], **bound})

    def trainer(self, stage: str, kind: type[Trainer] = Trainer, **bound: Any) -> Trainer:
        """See `stages.Builder`; the `kind` is `Trainer` or a subclass that takes the same arguments."""
        own = trainer_of(stage)
        kwargs = self._arguments("trainer", own)
        root = bound.get("default_root_dir")
        if kwargs["logger"] in (None, True) and root is not None:
            kwargs["logger"] = CSVLogger(root, name="metrics")
        elif root is not None and "logger" not in self._own_settings(own):
            prefix_loggers(kwargs["logger"], Path(root))
        callbacks = kwargs["callbacks"] or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if stage == "base":  # They may stop it, or ask for rollouts and validation, which demonstrations are not.
            callbacks = []
        _check_kinds(callbacks, own if "callbacks" in self._own_settings(own) else "trainer")
        if kwargs["enable_progress_bar"] is not False:
            # Lightning's bar counts batches: of sampling alone it says nothing.
            own_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
            if stage in SAMPLING_STAGES and not own_bar:
                bound = {"enable_progress_bar": False, **bound}
            if not any(isinstance(callback, SamplingProgress) for callback in callbacks):
                callbacks = [*callbacks, SamplingProgress()]
        kwargs["callbacks"] = [*callbacks, *bound.pop("callbacks", [])]
        saves = any(isinstance(callback, Checkpoint) for callback in kwargs["callbacks"])
        if stage == "base":  # The task says how it is trained.
            defaults = vars(self.parser.get_defaults()["trainer"])
            operational = OPERATIONAL_TRAINER_KEYS
            kwargs = {key: value if key in operational else defaults[key] for key, value in kwargs.items()}
        endless = all(kwargs[key] in (None, -1) for key in ("max_epochs", "max_steps", "max_time"))
        if endless and (stage in DEFAULT_EPOCHS or is_teacher(stage)):
            bound = {"max_epochs": DEFAULT_EPOCHS.get(stage, DEFAULT_EPOCHS["extreme_region"]), **bound}
        if stage in ("rollouts", "scoring"):  # Other stages build on these: part of a store is none.
            bound = {"fast_dev_run": False, "limit_predict_batches": None, **bound}
        try:
            trainer = kind(**{**kwargs, "enable_checkpointing": saves, **bound})
        except (*CONSTRUCTION_ERRORS, RuntimeError) as error:  # Lightning's say what it is about in words alone.
            key = own if self._own_settings(own) else "trainer"
            raise UserError(f"{key}: {shortened(one_line(error))}") from error
        try:
            check_strategy(trainer.strategy)
            check_steps(trainer)
            if trainer.limit_test_batches == 0:
                raise InvalidArgument("limit_test_batches", "is 0: the stage evaluation would measure nothing")
        except InvalidArgument as error:  # Before it starts any process.
            raise error.under(own if error.argument in self._own_settings(own) else "trainer") from error
        take_over_signals(trainer)
        return trainer

    def settings(self, stage: str) -> dict[str, Any]:
        """See `stages.Builder`."""
        data = canonical_class_paths(self.config["data"].as_dict())
        distill = canonical_class_paths(self.config["distill"].as_dict())
        own_trainer = trainer_of(stage)
        all_of_trainer = self._settings("trainer", own_trainer).as_dict()
        watched = False
        if stage in UNUSED_DATA_KEYS:
            own = {"trainer": trainer_settings(stage, all_of_trainer, None)}
            if stage == "signal_selection":
                own["distill"] = {key: distill[key] for key in sorted(TARGET_DISTILL_KEYS)}
        else:
            of_module = canonical_class_paths(self._settings(_group(stage), stage).as_dict())
            of_trainer = trainer_settings(stage, all_of_trainer, of_module)
            watched = is_watched(of_module, of_trainer)
            own = {stage: of_module, own_trainer: of_trainer}
            if is_teacher(stage):
                own[stage]["sign"] = self._sign(stage)
        return {**own, "dtype": self.config["dtype"], "data": data_settings(stage, data, distill, watched)}

    @contextmanager
    def keys_named(self, own: str) -> Iterator[None]:
        """Put the key that it was given under in front of an argument that is wrong."""
        try:
            yield
        except InvalidArgument as error:
            raise error.under(self._key(own, error.argument)) from error

    def named(self, stage: str, error: InvalidArgument) -> UserError:
        """See `stages.Builder`."""
        bare, group = error.argument.partition(".")[0], _group(stage)
        if group in CLASSES and bare in {*vars(self.config[group]), *BOUND_BY_CHAIN[group]}:
            return error.under(self._key(stage, bare))
        if bare in {*vars(self.config["data"]), *BOUND_BY_CHAIN["data"]}:
            return error.under("data")
        return error  # It says itself what it is an argument of.

    def _key(self, own: str, argument: str) -> str:
        """What an argument was given under: a stage's own key, or that of the group whose settings it shares."""
        bare = argument.partition(".")[0]
        return own if bare in self._own_settings(own) or bare in TEACHER_ONLY_KEYS else _group(own)

    def _arguments(self, group: str, own: str) -> dict[str, Any]:
        """The arguments of a group's class, with the classes among them instantiated."""
        changed = self._own_settings(own)
        return {
            name: instantiate(self.parser, f"{group}.{name}", value, f"{own if name in changed else group}.{name}")
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
        shared, changed = self.config[group], self._own_settings(own)
        if own == group or not changed:
            return shared
        start = f"{group}."
        known = {name.removeprefix(start) for name in option_names(self.parser) if name.startswith(start)}
        for name in unknown_settings(changed, known):
            bound = {f"{own}.{each}" for each in BOUND_BY_CHAIN[group]}
            raise UserError(unknown_option(f"{own}.{name}", {f"{own}.{each}" for each in known}, bound))
        try:
            return self.parser.parse_object({group: dict(changed)}, Namespace({group: shared.clone()}))[group]
        except ArgumentError as error:
            key, problem = rejected_value(str(error))
            raise UserError(with_key(own + key.removeprefix(group), problem)) from error

    def _own_settings(self, own: str) -> dict[str, Any]:
        """What the user set under a key of a stage's own."""
        if not is_teacher(own):
            return dict(self.config.get(own) or {})
        _, name, *trainer = own.split(".")
        settings = self.teachers[name]
        if trainer:
            return {**self._own_settings(trainer_of("extreme_region")), **settings.get("trainer", {})}
        return {key: value for key, value in settings.items() if key not in TEACHER_ONLY_KEYS}

    def _sign(self, stage: str) -> int:
        if is_teacher(stage):
            sign: int = self.teachers[stage.removeprefix("teachers.")].get("sign", 1)
            return sign
        return -1 if stage == "unlearned" else 1


def trainer_of(stage: str) -> str:
    """The key of a stage's trainer settings."""
    return f"{stage}.trainer" if is_teacher(stage) else f"{stage}_trainer"


def kl_references(module: TrainingModule) -> list[str]:
    """The policies that the chain gives a module to measure the KL to."""
    two = isinstance(module, DistillModule) and module.budget.total_budget is not None
    return [*module.references, "first"] if two else list(module.references)


def _check_kinds(callbacks: Iterable[Callback], key: str) -> None:
    """Refuse two callbacks that a checkpoint could not tell apart.

    Raises:
        UserError: Names what they are.
    """
    seen = set()
    for callback in callbacks:
        if type(callback).state_dict is not Callback.state_dict and callback.state_key in seen:
            raise UserError(
                f"{key}.callbacks: {type(callback).__name__} is there twice, and a checkpoint keeps one: take one out"
            )
        seen.add(callback.state_key)


def prefix_loggers(loggers: Any, folder: Path) -> None:
    """Give loggers that all stages share, and that the user gave no prefix, the stage's: its steps begin at 0 again."""
    stage = folder.parts[next((i for i, part in enumerate(folder.parts) if part.startswith("round-")), -1) :]
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if getattr(logger, "_prefix", None) == "":
            logger._prefix = "/".join(stage)


def _group(stage: str) -> str:
    """Where a stage's settings are; some stages have only those that differ from another's."""
    return "extreme_region" if stage == "unlearned" or is_teacher(stage) else stage
