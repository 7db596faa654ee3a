"""A run: its directory, and what was configured of the policies that are made in it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..data.arithmetic import Arithmetic
from ..data.evaluation_sets import Evaluation
from ..data.rollouts import RolloutDataModule
from ..modules.distill import DistillModule
from ..objectives.signal import AutoSignal
from ..seeds import derive_seed
from .records import Record, check_files, check_policy
from .stages import Builder


@dataclass
class Run:
    """A run directory, where everything lies in it, and which policies there are.

    Args:
        builder: Makes data modules, modules and trainers.
        run_dir: Where everything of the run lies.
        policy: Folder or hub name of the base policy; None where a task makes it.
        task: Makes prompts and a base policy; None where they are given.
        last_stage: The stage whose policy is a round's student: distill; or extreme_region for methods without a
            second stage, such as on-policy policy gradients or rejection-sampling fine-tuning.
        dtype: Data type of the weights wherever a policy is loaded, as in `torch`: sampling, scoring, evaluation,
            previews, references and training, for which it has to be float32.
        evaluation: Which policies are evaluated, and on which sets beside the held-out prompts.
        seed: Seed of all draws.
    """

    builder: Builder
    run_dir: Path = Path("runs/erpd")
    policy: str | None = None
    task: Arithmetic | None = None
    last_stage: str = "distill"
    dtype: str = "float32"
    evaluation: Evaluation = field(default_factory=Evaluation)
    seed: int = 0

    def round_dir(self, number: int) -> Path:
        """The directory of a round."""
        return self.run_dir / f"round-{number}"

    def student(self, number: int) -> Path | str:
        """The student of a round; that of round 0 is the base policy, a folder or a hub name."""
        if number == 0:
            return self.run_dir / "base" if self.policy is None else self.policy
        return self.round_dir(number) / ("distill/student" if self.distils else "extreme_region/student")

    def policies(self, number: int) -> dict[str, Path | str]:
        """The policies of a round by the names that signals and summaries use, the student's apart."""
        folder = self.round_dir(number)
        policies: dict[str, Path | str] = {"base": self.student(number - 1)}
        if self.distils:
            policies["teacher"] = folder / "extreme_region" / "teacher"
        if self.unlearns:
            policies["unlearned"] = folder / "unlearned" / "policy"
        if self.distils:
            policies |= {name: folder / "teachers" / name / "policy" for name in self.builder.teachers}
        return policies

    def evaluated(self, number: int) -> dict[str, Path | str]:
        """The policies of a round that are evaluated by name, the student, which always is, last."""
        asked = self.evaluation.policies
        made = {name: path for name, path in self.policies(number).items() if asked is None or name in asked}
        return {**made, "student": self.student(number)}

    def check_policies(self, policies: Iterable[Path | str]) -> None:
        """Whether policies of the run, and the prompts of its task, are those that its finished stages recorded.

        Raises:
            UserError: Names the one that is not, or the stage that is not finished.
        """
        for path in policies:
            if path == self.policy:  # The user's own.
                continue
            made = Path(path)
            check_policy(made, self.run_dir / "prepare" if made == self.student(0) else made.parent)
        if self.task is not None:
            check_files(task_files(self.run_dir), self.run_dir / "prepare")

    def data(self, number: int, with_scores: bool = False) -> RolloutDataModule:
        """The data module of a round."""
        folder = self.round_dir(number)
        bound: Record = {}
        if self.task is not None:
            bound["prompts"], bound["validation_prompts"] = task_files(self.run_dir)
        return self.builder.data(
            store=folder / "rollouts",
            tokenizer=self.student(0),
            scores=folder / "scoring" if with_scores else None,
            replay_stores=[self.round_dir(n) / "rollouts" for n in range(number - 1, 0, -1)],
            on_policy_store=folder / "distill" / "rollouts",
            round=number,
            preview_prompts=0 if self.auto_signal is None else self.auto_signal.prompts,
            seed=derive_seed(self.seed, "data", number),
            **bound,
        )

    def scored(self, number: int) -> dict[str, Path | str]:
        """The policies whose scores a student is distilled from, `base` first."""
        policies = self.policies(number)
        if self.distillation.budget.total_budget is not None:
            policies["first"] = self.student(0)
        return policies

    @cached_property
    def distillation(self) -> DistillModule:
        """The settings of the second stage."""
        module = self.builder.module("distill", policy="")
        assert isinstance(module, DistillModule)
        return module

    @property
    def unlearns(self) -> bool:
        """Whether the signal uses the unlearned policy, which is only then made."""
        return self.distils and "unlearned" in self.distillation.signal.policies

    @property
    def auto_signal(self) -> AutoSignal | None:
        """The candidates, where the signal is to be chosen among some."""
        signal = self.distillation.signal
        return signal if self.distils and isinstance(signal, AutoSignal) else None

    @property
    def distils(self) -> bool:
        """Whether there is a second stage."""
        return self.last_stage == "distill"

    @cached_property
    def iterates(self) -> bool:
        """Whether the extreme region stage samples as it trains."""
        return self.builder.data(store="", tokenizer="").iterations > 1

    def prompt_files(self) -> dict[str, str]:
        """Fingerprints of the prompts, of what is asked and answered in them."""
        plan = self.data(1).prompt_plan
        return {"prompts": plan.train_fingerprint, "validation_prompts": str(plan.validation_fingerprint)}


def task_files(run_dir: Path) -> list[Path]:
    """Files of a task's prompts in a run directory: those for training, and the held-out ones."""
    return [run_dir / "prompts" / f"{name}.jsonl" for name in ("train", "validation")]
