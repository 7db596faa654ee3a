"""The command line: a `LightningCLI` whose `fit` runs the chain of stages."""

import errno
import json
import logging
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from .data.rollouts import RolloutDataModule
from .data.store import atomic_write
from .distill import DistillModule
from .errors import UserError
from .extreme_region import ExtremeRegionModule
from .policy_module import PolicyModule
from .rounds import Rounds

BOUND_BY_CHAIN = {
    "extreme_region": {"policy", "references", "sign"},
    "distill": {"policy", "references"},
    "data": {"store", "tokenizer", "scores", "round", "seed"},
}
"""Arguments that the chain fills in, stage by stage."""

STAGE_TRAINERS = ("extreme_region", "unlearned", "distill")

OPERATIONAL = {
    "accelerator",
    "strategy",
    "devices",
    "num_nodes",
    "logger",
    "callbacks",
    "default_root_dir",
    "profiler",
    "log_every_n_steps",
    "check_val_every_n_epoch",
    "val_check_interval",
    "limit_val_batches",
    "limit_test_batches",
    "limit_predict_batches",
    "num_sanity_val_steps",
    "enable_checkpointing",
    "enable_progress_bar",
    "enable_model_summary",
    "plugins",
    "enable_autolog_hparams",
}
"""Trainer settings that change how a stage runs and is watched, but not what it makes."""

ROLLOUT_SETTINGS = ("sampler", "verifier", "group_size", "prompts_per_round")
EVALUATION_SETTINGS = ("sampler", "verifier", "validation_samples", "max_validation_prompts")


class ERPDCLI(LightningCLI):
    """`fit` chains the stages; `validate`, `test` and `predict` run on the policy of one of them."""

    def __init__(self, args: Any = None) -> None:
        quiet = {"exit_on_error": False}
        super().__init__(
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults={
                "accelerator": "auto",
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "gradient_clip_val": 1.0,
                "log_every_n_steps": 1,
            },
            parser_kwargs={**quiet, **{name: dict(quiet) for name in self.subcommands()}},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's own; the chain finds its checkpoints itself."""
        commands = LightningCLI.subcommands()
        return {**commands, "fit": {*commands["fit"], "ckpt_path", "weights_only"}}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The chain, the modules, the data, and the trainers."""
        parser.add_class_arguments(Rounds, skip={"builder", "seed"}, instantiate=False)
        add_groups(parser)
        defaults = {f"trainer.{key}": value for key, value in self.trainer_defaults.items()}
        parser.set_defaults(defaults)
        parser.add_argument(
            "--unlearned",
            type=dict[str, Any] | None,
            default=None,
            help="Settings of the unlearned policy that differ from those of extreme_region.",
        )
        for stage in STAGE_TRAINERS:
            parser.add_argument(
                f"--{stage}_trainer",
                type=dict[str, Any] | None,
                default=None,
                help=f"Trainer settings of the stage {stage} that differ from the shared ones "
                "(any key of --trainer, such as max_epochs, callbacks or logger).",
            )

    def instantiate_classes(self) -> None:
        """Check every part of the configuration; only what a stage needs is built when it begins."""
        self.config_init = self.config
        config = self.config[self.subcommand]
        self.builder = ConfigBuilder(config)
        names = ("run_dir", "rounds", "policy", "task", "checkpoint_every", "stage", "round")
        chain = {name: config[name] for name in names}
        if chain["task"] is not None:
            parser = LightningArgumentParser(exit_on_error=False)
            parser.add_class_arguments(Rounds, skip={"builder", "seed"}, instantiate=False)
            chain = parser.instantiate_classes(Namespace(chain)).as_dict()
        if self.subcommand != "fit":
            chain["stage"] = chain["stage"] or "distill"
        self.rounds = Rounds(builder=self.builder, seed=config["seed_everything"], **chain)
        self.builder.check()
        self.model: LightningModule | None = None
        self.datamodule = None
        self.trainer = self.builder.trainer("evaluation", logger=False)
        if self.subcommand != "fit":
            self._pick_policy(chain["stage"], chain["round"] or self.rounds.rounds)

    def fit(self, **_: Any) -> None:
        """Run the chain; the configuration lies in the run directory first."""
        if self.rounds.task is None and self.config["fit"]["data"]["validation_prompts"] is None:
            raise UserError(
                "data.validation_prompts is missing: what a student gained is measured on held-out prompts"
            )
        run_dir = Path(self.rounds.run_dir)
        if self.trainer.is_global_zero:
            run_dir.mkdir(parents=True, exist_ok=True)
            dumped = self._parser("fit").dump(self.config["fit"], skip_none=False)
            atomic_write(run_dir / "config.yaml", dumped)
        self.rounds.run()

    def predict(self, **kwargs: Any) -> None:
        """Sample and verify responses to the held-out prompts, and write them as JSONL."""
        tables: list[Any] = self.trainer.predict(**kwargs) or []
        rank = f"-{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
        path = self._folder / f"predictions{rank}.jsonl"
        rows = [row for table in tables for row in table.to_pylist()]
        kept = ("prompt", "response", "answer", "reward", "finish_reason")
        lines = (json.dumps({key: row[key] for key in kept}, ensure_ascii=False) for row in rows)
        atomic_write(path, "".join(f"{line}\n" for line in lines))
        print(f"{len(rows)} responses lie in {path}")

    def _pick_policy(self, stage: str, number: int) -> None:
        """The module and data of `validate`, `test` and `predict`: what the stage of the round made."""
        rounds = self.rounds
        made = {**rounds.policies(number), "student": rounds.student(number)}
        names = {"base": "base", "extreme_region": "teacher", "unlearned": "unlearned"}
        names["distill"] = "student"
        if stage not in names:
            raise UserError(f"stage is {stage!r}: {self.subcommand} takes one of {', '.join(names)}")
        policy = made[names[stage]]
        self._folder = rounds.round_dir(number)
        references = {"base": str(made["base"]), "first": str(rounds.student(0))}
        if stage == "base":
            self.model = PolicyModule(policy, references=references)
        else:
            self.model = self.builder.module(stage, policy=policy, references=references)
        self.datamodule = rounds.data(number)


class ConfigBuilder:
    """Makes modules, data and trainers from the configuration; a new one each time it is asked."""

    def __init__(self, config: Namespace) -> None:
        self.config = config

    def check(self) -> None:
        """Build everything once, so that a mistake shows before any work is done."""
        self.data(store="", tokenizer="")
        for stage in ("extreme_region", "unlearned", "distill"):
            self.module(stage, policy="")
            self._trainer_config(stage)

    def data(self, **bound: Any) -> RolloutDataModule:
        """See `rounds.Builder`."""
        return RolloutDataModule(**{**self._instantiate("data"), **bound})

    def module(self, stage: str, **bound: Any) -> PolicyModule:
        """See `rounds.Builder`."""
        if stage == "distill":
            return DistillModule(**{**self._instantiate("distill"), **bound})
        if stage == "unlearned":
            bound = {"sign": -1, **bound}
        return ExtremeRegionModule(**{**self._instantiate(stage), **bound})

    def trainer(self, stage: str, **bound: Any) -> Trainer:
        """See `rounds.Builder`."""
        config = self._trainer_config(stage)
        kwargs = _groups().instantiate_classes(Namespace(trainer=config))["trainer"].as_dict()
        root = bound.get("default_root_dir")
        if kwargs["logger"] in (None, True) and root is not None:
            kwargs["logger"] = CSVLogger(root, name="metrics")
        callbacks = [*(kwargs["callbacks"] or []), *bound.pop("callbacks", [])]
        kwargs["callbacks"] = callbacks
        kwargs["enable_checkpointing"] = any(isinstance(c, Checkpoint) for c in callbacks)
        return Trainer(**{**kwargs, **bound})

    def settings(self, stage: str) -> dict[str, Any]:
        """See `rounds.Builder`."""
        data = self._plain("data")
        if stage == "rollouts":
            return {"data": {key: data[key] for key in ROLLOUT_SETTINGS}}
        if stage == "evaluation":
            return {"data": {key: data[key] for key in EVALUATION_SETTINGS}}
        if stage == "signal":
            return {}
        trainer = self._trainer_config(stage).as_dict()
        kept = {key: value for key, value in trainer.items() if key not in OPERATIONAL}
        return {
            stage: self._plain(stage),
            f"{stage}_trainer": kept,
            "data": {"batch_size": data["batch_size"]},
        }

    def _stage_config(self, group: str) -> Namespace:
        """A group's settings; the unlearned policy's are those of extreme_region with its own over them."""
        if group != "unlearned":
            return self.config[group].clone()
        return self._override("extreme_region", "unlearned")

    def _trainer_config(self, stage: str) -> Namespace:
        return self._override("trainer", f"{stage}_trainer")

    def _override(self, group: str, overrides: str) -> Namespace:
        """A group's settings with others over them, checked like the group's own.

        Raises:
            UserError: Names the key that is wrong.
        """
        changed = self.config.get(overrides) or {}
        shared = self.config[group].clone()
        try:
            parser = _groups()
            merged = parser.parse_object({group: dict(changed)}, Namespace({group: shared}))
        except ArgumentError as error:
            raise UserError(f"{overrides}: {readable(error)}") from error
        return merged[group]

    def _instantiate(self, group: str) -> dict[str, Any]:
        key = "extreme_region" if group == "unlearned" else group
        config = Namespace({key: self._stage_config(group)})
        kwargs: dict[str, Any] = _groups().instantiate_classes(config)[key].as_dict()
        return kwargs

    def _plain(self, group: str) -> dict[str, Any]:
        plain: dict[str, Any] = self._stage_config(group).as_dict()
        return plain


def add_groups(parser: LightningArgumentParser) -> None:
    """The arguments of data, modules and trainer, all left as configuration until a stage begins."""
    classes = {
        "data": RolloutDataModule,
        "extreme_region": ExtremeRegionModule,
        "distill": DistillModule,
    }
    for key, target in classes.items():
        parser.add_class_arguments(target, key, skip=BOUND_BY_CHAIN[key], instantiate=False)
    parser.add_lightning_class_args(Trainer, "trainer")


def _groups() -> LightningArgumentParser:
    parser = LightningArgumentParser(exit_on_error=False)
    add_groups(parser)
    return parser


def readable(error: BaseException) -> str:
    """The line or two of a parser's message that say which key is wrong, and why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])


def main() -> None:
    """Run the command line; a mistake of the user's ends in a line or two and exit code 2."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        ERPDCLI()
    except (UserError, ArgumentError) as error:
        message = readable(error) if isinstance(error, ArgumentError) else str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"disk full while writing {error.filename or 'the run directory'}: free some space"
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
