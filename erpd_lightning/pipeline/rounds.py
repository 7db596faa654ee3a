"""The chain: rollouts, extreme region, unlearned policy, scoring, distillation, evaluation; round after round.

Which stages follow one another and what flows from one to the next; `round_stages` says what each does, and `stages`
how they run.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..models.policy import check_dtype, policy_fingerprint
from ..report.tables import format_summary
from .base_policy import make_base
from .evaluation import RoundEvaluation
from .records import round_summary, write_summary
from .round_stages import RoundStages
from .run import Run
from .stages import StageOnly, Stages, barrier, say, teacher_stage

STAGES = ("base", "rollouts", "extreme_region", "unlearned", "scoring", "signal_selection", "distill", "evaluation")


@dataclass
class Rounds(Run):
    """The chain of stages that fills a run directory, round after round.

    Args:
        builder: Makes data modules, modules and trainers.
        run_dir: Where everything of the run lies.
        rounds: How many rounds to run.
        policy: Folder or hub name of the base policy; None where a task makes it.
        task: Makes prompts and a base policy; None where they are given.
        checkpoint_every: Optimiser steps between the checkpoints that a killed stage goes on from.
        last_stage: The stage whose policy is a round's student: distill; or extreme_region for methods without a
            second stage, such as on-policy policy gradients or rejection-sampling fine-tuning.
        dtype: Data type of the weights wherever a policy is loaded, as in `torch`: sampling, scoring, evaluation,
            previews, references and training, for which it has to be float32.
        stage: The only stage to run, whose inputs have to be there: base, rollouts, extreme_region, unlearned,
            teachers.NAME, scoring, signal_selection, distill or evaluation; None for all.
        round: The round of that stage; None for the first in which it is not finished.
        seed: Seed of all draws.

    Raises:
        UserError: For a setting out of range.
    """

    rounds: int = 1
    checkpoint_every: int = 20
    stage: str | None = None
    round: int | None = None

    def __post_init__(self) -> None:
        self._stages = Stages(
            builder=self.builder,
            task=self.task,
            rounds=self.rounds,
            checkpoint_every=self.checkpoint_every,
            only=self.stage,
            only_round=self.round,
            seed=self.seed,
            dtype=self.dtype,
        )
        self._round_stages = RoundStages(self, self._stages)
        self._evaluation = RoundEvaluation(self, self._stages)
        check_dtype(self.dtype)
        if self.rounds < 1 or self.checkpoint_every < 1:
            raise UserError(f"rounds ({self.rounds}) and checkpoint_every ({self.checkpoint_every}) must be at least 1")
        if (self.policy is None) == (self.task is None):
            raise UserError("give either policy, the base policy to start from, or task, which makes one")
        if self.policy is not None and is_local(self.policy) and not Path(self.policy).is_dir():
            raise UserError(
                f"policy {self.policy} is missing: a Hugging Face folder or the name of a model on the hub is expected"
            )
        if self.last_stage not in ("distill", "extreme_region"):
            raise UserError(f"last_stage is {self.last_stage!r}: it must be distill or extreme_region")
        if self.iterates and self.distils:
            raise UserError(
                "data.iterations is above 1, but a student is distilled from fixed rollouts: "
                "leave it at 1, or set last_stage to extreme_region"
            )
        self._check_stage()
        if asked := self.evaluation.policies:
            known = [*self.policies(1), "student"]
            if unknown := {*asked}.difference(known):
                raise UserError(
                    f"evaluation.policies: no policy is called {', '.join(sorted(unknown))}; "
                    f"there are {', '.join(known)}"
                )

    def _check_stage(self) -> None:
        """Whether there is the one stage that is to be run."""
        stages = [*STAGES, *map(teacher_stage, self.builder.teachers)]
        if self.stage is not None and self.stage not in stages:
            raise UserError(f"stage is {self.stage!r}: it must be one of {', '.join(stages)}")
        if self.stage == "base" and self.task is None:
            raise UserError("stage is 'base', but policy gives the base policy: only a task makes one")
        if self.stage not in (None, "base", "rollouts", "extreme_region", "evaluation") and not self.distils:
            raise UserError(f"stage is {self.stage!r}, but last_stage is extreme_region: there is no such stage")
        if self.stage == "unlearned" and not self.unlearns:
            raise UserError("stage is 'unlearned', but distill.signal uses no unlearned policy")
        if self.stage == "signal_selection" and self.auto_signal is None:
            raise UserError("stage is 'signal_selection', but distill.signal is given: there is none to choose")
        if self.stage == "rollouts" and self.iterates:
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

    def _round(self, number: int) -> None:
        inputs = {"base": policy_fingerprint(self.student(number - 1))}
        if self.iterates:
            inputs |= self.prompt_files()
        else:
            inputs["rollouts"] = self._round_stages.rollouts(number, inputs["base"])["outcome"]["fingerprint"]
        if self.distils:
            self._two_stages(number, inputs)
        else:
            student = self._round_stages.extreme_region("extreme_region", "student", number, inputs)
            inputs["student"] = student["outcome"]["policy"]
        self._evaluation.evaluate(number, inputs)
        done, sets = range(1, number + 1), [*self.evaluation.sets]
        write_summary(self.run_dir, [round_summary(self.round_dir(n), n, [*self.evaluated(n)], sets) for n in done])
        barrier()
        if self.stage == "evaluation" and (self._stages.ran or self.round == number):
            raise StageOnly

    def _two_stages(self, number: int, inputs: dict[str, str]) -> None:
        """From rollouts to a distilled student; what is made along the way is noted in `inputs`."""
        needed = {key: inputs[key] for key in ("base", "rollouts")}
        for name in self.policies(number):
            if name != "base":
                stage = {"teacher": "extreme_region", "unlearned": "unlearned"}.get(name, teacher_stage(name))
                inputs[name] = self._round_stages.extreme_region(stage, name, number, needed)["outcome"]["policy"]
        stages, auto = self._round_stages, self.auto_signal
        inputs["scoring"] = stages.scoring(number, inputs)["outcome"]["fingerprint"]
        selection = None if auto is None else stages.select_signal(number, auto, inputs)["outcome"]
        chosen = {} if selection is None else {"signal_selection": selection["name"]}
        student = stages.distill(number, {**inputs, **chosen}, selection)
        inputs["student"] = student["outcome"]["policy"]


def is_local(policy: str) -> bool:
    """Whether the name of a policy can only be that of a folder."""
    return policy.startswith(("/", ".", "~")) or policy.count("/") > 1
