"""The command line: a `LightningCLI` whose `fit` runs the chain of stages, and `preview` its target."""

import json
import os
import sys
import zipfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from ..data.sources import ReadPrompts, read_prompts
from ..errors import UserError, refuse
from ..files import atomic_write, write_errors_named
from ..modules.evaluation import EvaluationModule
from ..modules.strategies import check_environment
from ..pipeline.evaluate import CommandTrainer
from ..pipeline.lock import lock_run_directory
from ..pipeline.rounds import Rounds, is_local
from ..pipeline.stages import say, teacher_stage
from ..processes import run_process
from ..seeds import derive_seed
from .config import ConfigBuilder
from .errors import rejected_value, unknown_option, with_key
from .given import check_files, unknown_keys
from .instantiate import instantiate
from .noise import quieten_libraries
from .options import CLASSES, DEFAULT_EPOCHS, add_options, bound_keys, class_options, option_names

POLICY_OF = {"base": "base", "extreme_region": "teacher", "unlearned": "unlearned", "distill": "student"}
"""Which policy a stage makes; `validate`, `test` and `predict` run on it."""


class ERPDCLI(LightningCLI):
    """`fit` chains the stages; `validate`, `test` and `predict` run on the policy of one of them.

    `preview` decodes from the target that a student would be distilled to, and `evaluate` takes any policy.
    """

    def __init__(self, args: Any = None) -> None:
        # Mistakes are told in a line by `main`, and no beginning of an option's name stands for it.
        strict = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            save_config_callback=None,
            trainer_class=CommandTrainer,  # Where Lightning looks for subcommands.
            seed_everything_default=0,
            parser_kwargs={
                **strict,
                "prog": "python -m erpd_lightning",
                "description": "Extreme Region Policy Distillation: many epochs on fixed rollouts, "
                "then distillation under a KL budget.",
                "epilog": "Three more take no configuration: 'report RUN [RUN ...]' writes an HTML page on runs, "
                "finished or not, 'rollouts audit' and 'rollouts import' look into stores of rollouts and make them of "
                "what lies elsewhere, and 'push RUN_OR_FOLDER --repo NAME' pushes a policy to the hub; their --help "
                "tells more.",
                **{name: dict(strict) for name in self.subcommands()},
                "fit": {**strict, "description": "Run every stage of every round that is not done yet."},
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's own, of which the chain finds its checkpoints itself, `preview` and `evaluate`."""
        commands = LightningCLI.subcommands()
        return {
            **commands,
            "fit": {*commands["fit"], "ckpt_path", "weights_only"},
            "preview": {"rounds"},
            "evaluate": {"policy", "data", "evaluation", "dtype"},
        }

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The chain, the modules, the data, and the trainers."""
        parser.add_class_arguments(Rounds, skip={"builder", "evaluation", "seed"}, instantiate=False)
        add_options(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and tell a mistake in a line.

        Raises:
            UserError: Names the key or the file that is wrong.
        """
        given: Sequence[str] = sys.argv[1:] if args is None else args
        own_parser = self._parser(next((arg for arg in given if arg in self.subcommands()), "fit"))
        check_files(given, {*CLASSES, *class_options(own_parser)})
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            options = option_names(own_parser)
            for key in unknown_keys(given, options):
                raise UserError(unknown_option(key, options, bound_keys())) from error
            raise UserError(with_key(*rejected_value(str(error)))) from error
        config = self.config[self.config["subcommand"]]
        seed, checkpoint = config["seed_everything"], config.get("ckpt_path")
        if seed is False or not 0 <= seed < 2**32:
            raise UserError(f"seed_everything is {seed}: it must lie between 0 and {2**32 - 1}, or be true")
        if checkpoint and not (Path(checkpoint).is_dir() or zipfile.is_zipfile(checkpoint)):
            raise UserError(f"ckpt_path {checkpoint} is missing or damaged: a checkpoint of Lightning's is expected")
        if "weights_only" in config and config["weights_only"] is None:
            config["weights_only"] = True  # Lightning would unpickle whatever is in a local file.

    def instantiate_classes(self) -> None:
        """Check every part of the configuration; only what a stage needs is built when it begins."""
        self.config_init = self.config
        config = self.config[self.subcommand]
        self.builder = ConfigBuilder(config, self._parser(self.subcommand))
        chain = {field.name: config[field.name] for field in fields(Rounds) if field.name in config}
        chain["task"] = instantiate(self.builder.parser, "task", chain["task"])
        chain["evaluation"] = self.builder.evaluation()
        self.model: LightningModule | None = None
        self.datamodule: LightningDataModule | None = None
        if self.subcommand == "evaluate":
            self.trainer = self.builder.trainer("evaluation", kind=CommandTrainer, logger=False)
            return
        given = [name for name in ("prompts", "validation_prompts") if config["data"][name] is not None]
        if chain["task"] is not None and given:
            raise UserError(f"data.{given[0]} is given, but task makes the prompts: leave one of them null")
        runs_policy = self.subcommand not in ("fit", "preview")
        stage = chain["stage"] or chain["last_stage"]
        # What a run of one stage left in its configuration; and a base policy that is given is none that `fit` makes.
        if self.subcommand == "preview" or (runs_policy and stage == "base"):
            chain["stage"] = None
        self.rounds = Rounds(builder=self.builder, seed=config["seed_everything"], **chain)
        self.trainer = self.builder.trainer("evaluation", kind=CommandTrainer, logger=False)
        self.builder.check()
        if runs_policy:
            self._pick_policy(stage, chain["round"] or self.rounds.rounds)

    def fit(self, **_: Any) -> None:
        """Run the chain; the configuration lies in the run directory first."""
        read = [] if self.rounds.task is not None else self._read_prompts()
        trained = [*DEFAULT_EPOCHS, *map(teacher_stage, self.builder.teachers)]
        self._check_evaluation_sets()
        only = self.rounds.stage
        self.builder.check_trainable([stage for stage in trained if only in (None, stage)])
        run_dir = Path(self.rounds.run_dir)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run_dir {run_dir} cannot be used: {error.strerror}") from error
        # The other ranks are started by rank zero, or together with it.
        with write_errors_named(run_dir), lock_run_directory(run_dir) if self.trainer.is_global_zero else nullcontext():
            self._run_chain(run_dir / "config.yaml", read)

    def _run_chain(self, written: Path, read: list[ReadPrompts]) -> None:
        """Run the chain with its configuration written, and the one before put back where a mistake ends it."""
        try:
            before = written.read_bytes() if written.exists() else None
        except OSError as error:
            raise UserError(f"{written} cannot be read: {error.strerror}") from error
        self._write(written, self._parser("fit").dump(self.config["fit"], skip_unset=False))
        self._list_left_out(read, written.parent / "prompts" / "left_out.jsonl")
        try:
            self.rounds.run()
        except UserError:
            if before is not None:  # What is there was made with the configuration that was there.
                self._write(written, before)
            raise

    def _read_prompts(self) -> list[ReadPrompts]:
        """What is read of the prompts, before any work is done.

        Raises:
            UserError: If they cannot be used, or none are held out.
        """
        plan = self.rounds.data(1).prompt_plan
        with self.builder.keys_named("data"):
            plan.sampled()
            if not plan.held_out:
                raise UserError(
                    "data.validation_prompts is missing: what a student gained is measured on held-out prompts"
                )
        return plan.read

    def _list_left_out(self, read: list[ReadPrompts], path: Path) -> None:
        """Tell which prompts were left out, and list them in a file."""
        if lines := [line for each in read for line in each.listed()]:
            path.parent.mkdir(exist_ok=True)
            self._write(path, "".join(f"{line}\n" for line in lines))
        for each in read:
            if each.left_out:
                say(f"{each.report()} (listed in {path})")

    def _check_evaluation_sets(self) -> None:
        """Read the prompts of evaluation sets, so that a mistake shows before any work is done.

        Raises:
            UserError: Names the set; of one in the run directory, which a task makes, it shows when it is used.
        """
        for name, evaluation_set in self.rounds.evaluation.sets.items():
            if Path(self.rounds.run_dir) in Path(str(evaluation_set.prompts)).parents:
                continue
            try:
                read_prompts(evaluation_set.prompts)
            except UserError as error:
                raise UserError(f"evaluation.sets.{name}: {error}") from error

    def preview(self, budgets: list[float] | None = None, **_: Any) -> None:
        """Decode from the targets of a round's signal; nothing of the run changes."""
        assert isinstance(self.trainer, CommandTrainer)
        self.trainer.preview(self.rounds, budgets)

    def evaluate(self, reference: str | None = None, output: Path | None = None, **_: Any) -> None:
        """Evaluate any policy on held-out prompts and evaluation sets; no run directory is made."""
        assert isinstance(self.trainer, CommandTrainer)
        config = self.config["evaluate"]
        policy, made = config["policy"], Path(config["run_dir"]) / "prompts" / "validation.jsonl"
        if policy is None:
            raise UserError("policy is missing: evaluate takes --policy, a Hugging Face folder or the name of a model")
        for key, path in (("policy", policy), ("reference", reference)):
            if path is not None and is_local(path) and not Path(path).is_dir():
                raise UserError(f"{key} {path} is missing: a Hugging Face folder is expected there")
        # A task's prompts lie in its run.
        bound: dict[str, Any] = {"validation_prompts": made} if config["task"] is not None and made.is_file() else {}
        seed = derive_seed(config["seed_everything"], "data", 1)
        data = self.builder.data(**bound, store="", tokenizer=policy, seed=seed)
        with self.builder.keys_named("data"):
            self.trainer.evaluate(policy, data, self.builder.evaluation(), config["dtype"], reference, output)

    def predict(self, **kwargs: Any) -> None:
        """Sample and verify responses to the held-out prompts, and write them as JSONL."""
        tables: list[Any] = self.trainer.predict(**kwargs) or []
        rank = f"-{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
        path = self._predictions.with_name(f"{self._predictions.name}{rank}.jsonl")
        rows = [row for table in tables for row in table.to_pylist()]
        kept = ("prompt", "response", "answer", "reward", "finish_reason")
        lines = (json.dumps({key: row[key] for key in kept}, ensure_ascii=False) for row in rows)
        atomic_write(path, "".join(f"{line}\n" for line in lines))
        print(f"{len(rows)} responses lie in {path}")

    def _pick_policy(self, stage: str, number: int) -> None:
        """The module and data of `validate`, `test` and `predict`: what the stage of the round made."""
        if stage not in POLICY_OF:
            raise UserError(f"stage is {stage!r}: {self.subcommand} takes one of {', '.join(POLICY_OF)}")
        rounds = self.rounds
        name = "student" if stage == rounds.last_stage else POLICY_OF[stage]
        made = {**rounds.policies(number), "student": rounds.student(number)}
        policy = made[name]
        if isinstance(policy, Path) and not policy.is_dir():
            raise UserError(f"{policy} is missing: fit makes it, in the stage {stage} of round {number}")
        rounds.check_policies(dict.fromkeys([policy, made["base"], rounds.student(0)]))
        self._predictions = rounds.round_dir(number) / f"predictions-{name}"
        references = {"base": str(made["base"]), "first": str(rounds.student(0))}
        if stage == "base":
            self.model = EvaluationModule(policy, references=references, dtype=rounds.dtype)
        else:
            self.model = self.builder.module(stage, policy=policy, references=references)
        self.datamodule = rounds.data(number)

    def _write(self, path: Path, content: bytes | str) -> None:
        if self.trainer.is_global_zero:
            atomic_write(path, content)


def main() -> None:
    """Run the command line; a mistake of the user's ends in a line or two and exit code 2, a signal in one line."""
    with run_process.unwinding():
        _main()


def _main() -> None:
    quieten_libraries()
    try:
        check_environment(os.environ)
    except UserError as error:  # Nobody can tell which rank this is.
        refuse(str(error))
    try:
        with write_errors_named("the run directory"):
            ERPDCLI()
    except (UserError, MisconfigurationException) as error:
        run_process.refuse(str(error))
