"""The chain: rollouts, extreme region, unlearned policy, signal, distillation, evaluation; round after round.

What the stages are and what flows from one to the next; `stages` says how they run.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch

from ..data.arithmetic import Arithmetic
from ..data.batching import RolloutTable
from ..data.rollouts import RolloutDataModule
from ..data.samples import SAMPLES_FILE
from ..data.store import Store
from ..errors import UserError
from ..files import sha256_file
from ..models.policy import policy_fingerprint
from ..modules.distill import DistillModule
from ..modules.sample_keeper import SampleKeeper
from ..objectives.signal import AutoSignal, Signal, Term
from ..objectives.tilted_policy import UnreachableBudget
from ..report.tables import format_summary
from ..seeds import derive_seed
from .base_policy import make_base
from .records import Record, round_summary, write_summary
from .signal_search import choose, load_models, preview, within
from .stages import Builder, StageOnly, Stages, barrier, say, teacher_stage

STAGES = ("base", "rollouts", "extreme_region", "unlearned", "signal", "choice", "distill", "evaluation")


@dataclass
class Rounds:
    """A run directory and the chain of stages that fills it.

    Args:
        builder: Makes data modules, modules and trainers.
        run_dir: Where everything of the run lies.
        rounds: How many rounds to run.
        policy: Folder or hub name of the base policy; None where a task makes it.
        task: Makes prompts and a base policy; None where they are given.
        checkpoint_every: Optimiser steps between the checkpoints that a killed stage goes on from.
        last_stage: The stage whose policy is a round's student: distill; or extreme_region for methods without a
            second stage, such as on-policy policy gradients or rejection-sampling fine-tuning.
        stage: The only stage to run, whose inputs have to be there: base, rollouts, extreme_region, unlearned,
            teachers.NAME, signal, choice, distill or evaluation; None for all.
        round: The round of that stage; None for the first in which it is not finished.
        seed: Seed of all draws.

    Raises:
        UserError: For a setting out of range.
    """

    builder: Builder
    run_dir: Path = Path("runs/erpd")
    rounds: int = 1
    policy: str | None = None
    task: Arithmetic | None = None
    checkpoint_every: int = 20
    last_stage: str = "distill"
    stage: str | None = None
    round: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._stages = Stages(
            builder=self.builder,
            task=self.task,
            rounds=self.rounds,
            checkpoint_every=self.checkpoint_every,
            only=self.stage,
            only_round=self.round,
            seed=self.seed,
        )
        if self.rounds < 1 or self.checkpoint_every < 1:
            raise UserError(f"rounds ({self.rounds}) and checkpoint_every ({self.checkpoint_every}) must be at least 1")
        if (self.policy is None) == (self.task is None):
            raise UserError("give either policy, the base policy to start from, or task, which makes one")
        if self.policy is not None and _is_local(self.policy) and not Path(self.policy).is_dir():
            raise UserError(
                f"policy {self.policy} is missing: a Hugging Face folder or the name of a model on the hub is expected"
            )
        if self.last_stage not in ("distill", "extreme_region"):
            raise UserError(f"last_stage is {self.last_stage!r}: it must be distill or extreme_region")
        if self._iterates and self._distils:
            raise UserError(
                "data.iterations is above 1, but a student is distilled from fixed rollouts: "
                "leave it at 1, or set last_stage to extreme_region"
            )
        stages = [*STAGES, *map(teacher_stage, self.builder.teachers)]
        if self.stage is not None and self.stage not in stages:
            raise UserError(f"stage is {self.stage!r}: it must be one of {', '.join(stages)}")
        if self.stage == "base" and self.task is None:
            raise UserError("stage is 'base', but policy gives the base policy: only a task makes one")
        if self.stage not in (None, "base", "rollouts", "extreme_region", "evaluation") and not self._distils:
            raise UserError(f"stage is {self.stage!r}, but last_stage is extreme_region: there is no such stage")
        if self.stage == "unlearned" and not self._unlearns:
            raise UserError("stage is 'unlearned', but distill.signal uses no unlearned policy")
        if self.stage == "choice" and self._auto is None:
            raise UserError("stage is 'choice', but distill.signal is given: there is none to choose")
        if self.stage == "rollouts" and self._iterates:
            raise UserError("stage is 'rollouts', but data.iterations is above 1: extreme_region samples as it trains")
        if self.round is not None and not 1 <= self.round <= self.rounds:
            raise UserError(f"round is {self.round}: it must lie between 1 and rounds ({self.rounds})")

    def run(self) -> None:
        """Run what is not done yet, write `summary.json` after each round, and print the table."""
        try:
            if self.task is not None:
                make_base(self.task, self.run_dir, self._stages)
            for number in range(1, self.rounds + 1):
                self._round(number)
        except StageOnly:
            return
        say(format_summary(json.loads((self.run_dir / "summary.json").read_text())))
        say(f"The student lies in {self.student(self.rounds)}")

    # Where things lie.

    def round_dir(self, number: int) -> Path:
        """The directory of a round."""
        return self.run_dir / f"round-{number}"

    def student(self, number: int) -> Path | str:
        """The student of a round; that of round 0 is the base policy, a folder or a hub name."""
        if number == 0:
            return self.run_dir / "base" if self.policy is None else self.policy
        return self.round_dir(number) / ("distill/student" if self._distils else "extreme_region/student")

    def policies(self, number: int) -> dict[str, Path | str]:
        """The policies of a round by the names that signals and summaries use, the student's apart."""
        folder = self.round_dir(number)
        policies: dict[str, Path | str] = {"base": self.student(number - 1)}
        if self._distils:
            policies["teacher"] = folder / "extreme_region" / "teacher"
        if self._unlearns:
            policies["unlearned"] = folder / "unlearned" / "policy"
        if self._distils:
            policies |= {name: folder / "teachers" / name / "policy" for name in self.builder.teachers}
        return policies

    def data(self, number: int, with_scores: bool = False) -> RolloutDataModule:
        """The data module of a round."""
        folder = self.round_dir(number)
        bound: Record = {}
        if self.task is not None:
            bound["prompts"] = self.run_dir / "prompts" / "train.jsonl"
            bound["validation_prompts"] = self.run_dir / "prompts" / "validation.jsonl"
        return self.builder.data(
            store=folder / "rollouts",
            tokenizer=self.student(0),
            scores=folder / "signal" if with_scores else None,
            earlier=[self.round_dir(n) / "rollouts" for n in range(number - 1, 0, -1)],
            fresh=folder / "distill" / "rollouts",
            round=number,
            preview_prompts=0 if self._auto is None else self._auto.prompts,
            seed=derive_seed(self.seed, "data", number),
            **bound,
        )

    def _scored(self, number: int) -> dict[str, Path | str]:
        """The policies whose scores a student is distilled from, `base` first."""
        policies = self.policies(number)
        if self._distillation.total_budget is not None:
            policies["first"] = self.student(0)
        return policies

    @cached_property
    def _distillation(self) -> DistillModule:
        """The settings of the second stage."""
        module = self.builder.module("distill", policy="")
        assert isinstance(module, DistillModule)
        return module

    @property
    def _unlearns(self) -> bool:
        """Whether the signal uses the unlearned policy, which is only then made."""
        return self._distils and "unlearned" in self._distillation.signal.policies

    @property
    def _auto(self) -> AutoSignal | None:
        """The candidates, where the signal is to be chosen among some."""
        signal = self._distillation.signal
        return signal if self._distils and isinstance(signal, AutoSignal) else None

    @property
    def _distils(self) -> bool:
        """Whether there is a second stage."""
        return self.last_stage == "distill"

    @cached_property
    def _iterates(self) -> bool:
        """Whether the extreme region stage samples as it trains."""
        return self.builder.data(store="", tokenizer="").iterations > 1

    # The stages.

    def _round(self, number: int) -> None:
        inputs = {"base": policy_fingerprint(self.student(number - 1))}
        if self._iterates:
            inputs |= self._prompt_files()
        else:
            inputs["rollouts"] = self._rollouts(number, inputs["base"])["outcome"]["fingerprint"]
        if self._distils:
            self._two_stages(number, inputs)
        else:
            inputs["student"] = self._extreme("extreme_region", "student", number, inputs)["outcome"]["policy"]
        self._evaluate(number, inputs)
        done = range(1, number + 1)
        write_summary(self.run_dir, [round_summary(self.round_dir(n), n, [*self.policies(n), "student"]) for n in done])
        barrier()
        if self.stage == "evaluation" and (self._stages.ran or self.round == number):
            raise StageOnly

    def _two_stages(self, number: int, inputs: dict[str, str]) -> None:
        """From rollouts to a distilled student; what is made along the way is noted in `inputs`."""
        needed = {key: inputs[key] for key in ("base", "rollouts")}
        for name in self.policies(number):
            if name != "base":
                stage = {"teacher": "extreme_region", "unlearned": "unlearned"}.get(name, teacher_stage(name))
                inputs[name] = self._extreme(stage, name, number, needed)["outcome"]["policy"]
        inputs["signal"] = self._signal(number, inputs)["outcome"]["fingerprint"]
        choice = None if self._auto is None else self._choose(number, self._auto, inputs)["outcome"]
        student = self._distill(number, inputs if choice is None else {**inputs, "choice": choice["name"]}, choice)
        inputs["student"] = student["outcome"]["policy"]

    def _rollouts(self, number: int, base: str) -> Record:
        folder = self.round_dir(number) / "rollouts"

        def body() -> Record:
            data = self.data(number)
            data.check_groups(self.builder.module("extreme_region", policy=""))
            self._stages.predict("rollouts", folder, self.student(number - 1), data.sampling())
            return _outcome([Store.open(folder, verify=False)])

        inputs = {"base": base, **self._prompt_files()}
        about = "sampling and verifying responses of the base policy"
        record = self._stages.run("rollouts", number, folder, about, inputs, body)
        Store.open(folder)  # An altered store must not be trained on.
        return record

    def _extreme(self, stage: str, name: str, number: int, inputs: dict[str, str]) -> Record:
        folder = self.round_dir(number) / stage.replace(".", "/")
        if replayed := self.data(number).trained_on[1:]:
            prints = [Store.open(path, verify=False).fingerprint for path in replayed]
            inputs = {**inputs, "replayed": _together(prints)}
        path = {**self.policies(number), "student": self.student(number)}[name]

        def body() -> Record:
            module = self.builder.module(stage, policy=self.student(number - 1))
            data = self.data(number)
            warnings = self._stages.fit(stage, folder, module, data)
            module.export(path, tokenizer=self.student(0))
            sampled = _outcome([Store.open(store) for store in data.stores()]) if self._iterates else {}
            return {"policy": policy_fingerprint(path), "warnings": warnings, **sampled}

        about = {
            "teacher": "driving a teacher far from the base policy on the fixed rollouts",
            "unlearned": "driving an unlearned policy the other way",
            "student": "training the student on its own fresh rollouts"
            if self._iterates
            else "training the student on the fixed rollouts",
        }.get(name, f"driving {name} away from the base policy on the fixed rollouts")
        return self._stages.run(stage, number, folder, about, inputs, body)

    def _signal(self, number: int, inputs: dict[str, str]) -> Record:
        folder = self.round_dir(number) / "signal"

        def body() -> Record:
            data = self.data(number, with_scores=True)
            for name, path in self._scored(number).items():
                self._stages.predict("signal", folder, path, data.scoring(name))
            prints = [Store.open(folder / n, verify=False).fingerprint for n in self._scored(number)]
            return {"fingerprint": _together(prints)}

        about = "scoring the rollouts once with each policy"
        record = self._stages.run("signal", number, folder, about, inputs, body)
        for name in self._scored(number):
            Store.open(folder / name)
        return record

    def _choose(self, number: int, auto: AutoSignal, inputs: dict[str, str]) -> Record:
        folder = self.round_dir(number) / "choice"

        def body() -> Record:
            data = self.data(number, with_scores=True)
            names = auto.policies
            scores = {name: data.rollouts.flat_scores(name) for name in {"base", *names}}
            assert self._distillation.kl_budget is not None
            try:
                candidates = within(auto, self._distillation.kl_budget, scores)
            except UnreachableBudget as error:
                raise UserError(f"distill.kl_budget: {error}") from error
            prompts = data.held_out_for_previews()
            batches = list(data.prompt_batches(prompts, auto.samples, "choice", 0, 1))
            trainer = self.builder.trainer("choice", logger=False)
            paths = {name: path for name, path in self.policies(number).items() if name in scores}
            models = load_models(paths, trainer)
            with trainer.precision_plugin.forward_context():
                rows = preview(candidates, models, scores, batches)
            best = choose(rows)
            return {
                "name": best.candidate.name,
                "terms": [asdict(term) for term in best.candidate.signal.terms],
                "budget": best.candidate.budget or best.kl_on_stored_states,
                "rollouts": sum(row.samples for row in rows),
                "candidates": [row.record() for row in rows],
            }

        about = f"choosing among {len(auto.candidates())} signals by decoding from them"
        return self._stages.run("choice", number, folder, about, inputs, body)

    def _distill(self, number: int, inputs: dict[str, str], choice: Record | None) -> Record:
        folder = self.round_dir(number) / "distill"
        chosen: Record = {}
        if choice is not None:
            chosen = {"signal": Signal([Term(**term) for term in choice["terms"]]), "kl_budget": choice["budget"]}

        def body() -> Record:
            references = {"base": str(self.student(number - 1))}
            if "first" in self._scored(number):
                references["first"] = str(self.student(0))
            policies = {name: str(path) for name, path in self._scored(number).items()}
            module = self.builder.module(
                "distill", policy=self.student(number - 1), references=references, policies=policies, **chosen
            )
            assert isinstance(module, DistillModule)
            data = self.data(number, with_scores=True)
            warnings = self._stages.fit("distill", folder, module, data)
            answered = [Store.open(path).rows for path in data.trained.stores()] if module.iterations > 1 else []
            module.export(self.student(number), tokenizer=self.student(0))
            return {
                "policy": policy_fingerprint(self.student(number)),
                "warnings": warnings,
                "spending": {
                    "budget": module.kl_budget,
                    "total_budget": module.total_budget,
                    "to_spend": module.to_spend,
                    "beta": module.beta,
                    "beta_first": None if module.solution is None else module.solution.beta_first,
                    "kl_on_stored_states": None if module.solution is None else module.solution.kl_base,
                    "answered_in_distillation": sum(answered),
                    "line_share": None if module.landing is None else module.landing.share,
                },
            }

        about = "distilling the signal back into the base policy under the KL budget"
        return self._stages.run("distill", number, folder, about, inputs, body)

    def _evaluate(self, number: int, inputs: dict[str, str]) -> None:
        policies = {**self.policies(number), "student": self.student(number)}
        for name, path in policies.items():
            folder = self.round_dir(number) / "evaluation" / name

            def body(path: Path | str = path, folder: Path = folder) -> Record:
                data = self.data(number)
                references = {"base": str(self.student(number - 1)), "first": str(self.student(0))}
                module = SampleKeeper(path, references, folder / SAMPLES_FILE)
                trainer = self.builder.trainer("evaluation", default_root_dir=folder, logger=False)
                trainer.test(module, datamodule=data, verbose=False)
                measured = {key.removeprefix("test/"): float(value) for key, value in trainer.callback_metrics.items()}
                sizes = {
                    "prompts": len(data.held_out_prompts()),
                    "samples_per_prompt": data.validation_samples,
                }
                return {**measured, **sizes}

            about = f"measuring {name} on fresh samples for held-out prompts"
            prints = {key: inputs[key] for key in ("base", name)}
            self._stages.run("evaluation", number, folder, about, prints, body)

    def _prompt_files(self) -> dict[str, str]:
        data = self.data(1)
        files = {"prompts": data.prompts, "validation_prompts": data.validation_prompts}
        return {
            name: sha256_file(path) if path is not None and Path(path).is_file() else str(path)
            for name, path in files.items()
        }


def _outcome(stores: list[Store]) -> Record:
    """What a record says of rollouts."""
    rewards = torch.cat([RolloutTable.from_arrow(store.table()).rewards for store in stores])
    prints = [store.fingerprint for store in stores]
    return {
        "fingerprint": prints[0] if len(prints) == 1 else _together(prints),
        "rollouts": len(rewards),
        "mean_reward": float(rewards.mean()),
    }


def _together(fingerprints: list[str]) -> str:
    """One fingerprint for several."""
    return hashlib.sha256("".join(fingerprints).encode()).hexdigest()


def _is_local(policy: str) -> bool:
    """Whether the name of a policy can only be that of a folder."""
    return policy.startswith(("/", ".", "~")) or policy.count("/") > 1
