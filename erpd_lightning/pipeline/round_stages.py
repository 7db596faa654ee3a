"""The stages of a round: what each is made from, what it does, and what it leaves behind."""

from dataclasses import asdict, dataclass
from pathlib import Path

from ..data.imports import import_fingerprint
from ..data.ranks import gathered, started_ranks
from ..data.rescoring import rescored_store
from ..data.store import MANIFEST, Store
from ..errors import UserError
from ..models.policy import policy_fingerprint
from ..modules.distill import DistillModule
from ..objectives.signal import AutoSignal, Signal, Term
from ..objectives.tilted_policy import UnreachableBudget
from .outcome import rollouts_outcome
from .records import Record, fingerprint_of
from .run import Run
from .signal_search import Preview, candidates_within_budget, choose, load_models, preview
from .stages import Stages, say


@dataclass
class RoundStages:
    """The stages of the rounds of a run, each skipped where it is done.

    Args:
        run: The run.
        stages: Runs a stage, or skips it.
    """

    run: Run
    stages: Stages

    def rollouts(self, number: int, base: str) -> Record:
        """Sample and verify the round's rollouts, or import them."""
        folder = self.run.round_dir(number) / "rollouts"
        imported = self.run.data(number).imported if number == 1 else None

        def body() -> Record:
            data = self.run.data(number)
            module = self.run.builder.module("extreme_region", policy="")
            data.check_groups(module.needs_groups)
            policy = self.run.student(number - 1)
            self.stages.predict("rollouts", folder, policy, data.sampling() if imported is None else data.importing())
            if data.rescores:
                self.stages.predict("rollouts", folder, policy, data.rescoring())
            steps = data.optimizer_steps(module.select)
            return _told(*rollouts_outcome(data, [folder], steps, stop=data.audit_stop))

        inputs = {"base": base, **self.run.prompt_files()}
        about = "sampling and verifying responses of the base policy"
        if imported is not None:
            inputs["imported"] = import_fingerprint(imported)
            about = "importing and verifying responses from elsewhere"
        record = self.stages.run("rollouts", number, folder, about, inputs, body)
        _check_store(folder)
        return record

    def extreme_region(self, stage: str, name: str, number: int, inputs: dict[str, str]) -> Record:
        """Train a teacher, an unlearned policy, or the student of a method of one stage, on the rollouts."""
        folder = self.run.round_dir(number) / stage.replace(".", "/")
        if replayed := self.run.data(number).train_data.train_stores[1:]:
            prints = [Store.open(path, verify=False).fingerprint for path in replayed]
            inputs = {**inputs, "replayed": fingerprint_of(prints)}
        path = {**self.run.policies(number), "student": self.run.student(number)}[name]

        def body() -> Record:
            module = self.run.builder.module(stage, policy=self.run.student(number - 1))
            data = self.run.data(number)
            warnings = self.stages.fit(stage, folder, module, data)
            module.export(path, tokenizer=self.run.student(0))
            own = data.train_data.finished_stores if self.run.iterates else []
            sampled = _told(*rollouts_outcome(data, own)) if own else {"warnings": []}
            warnings += sampled["warnings"]
            return {**sampled, "policy": policy_fingerprint(path), "warnings": warnings}

        about = {
            "teacher": "driving a teacher far from the base policy on the fixed rollouts",
            "unlearned": "driving an unlearned policy the other way",
            "student": "training the student on its own fresh rollouts"
            if self.run.iterates
            else "training the student on the fixed rollouts",
        }.get(name, f"driving {name} away from the base policy on the fixed rollouts")
        return self.stages.run(stage, number, folder, about, inputs, body, policy=path)

    def scoring(self, number: int, inputs: dict[str, str]) -> Record:
        """Score the rollouts with each policy."""
        folder = self.run.round_dir(number) / "scoring"

        def body() -> Record:
            data = self.run.data(number, with_scores=True)
            for name, path in self.run.scored(number).items():
                self.stages.predict("scoring", folder, path, data.scoring(name))
            prints = [Store.open(folder / n, verify=False).fingerprint for n in self.run.scored(number)]
            return {"fingerprint": fingerprint_of(prints)}

        about = "scoring the rollouts once with each policy"
        record = self.stages.run("scoring", number, folder, about, inputs, body)
        for name in self.run.scored(number):
            _check_store(folder / name)
        return record

    def select_signal(self, number: int, auto: AutoSignal, inputs: dict[str, str]) -> Record:
        """Choose the signal by preview."""
        folder = self.run.round_dir(number) / "signal_selection"

        def body() -> Record:
            data = self.run.data(number, with_scores=True)
            names = auto.policies
            scores = {name: data.rollouts.flat_scores(name) for name in {"base", *names}}
            assert self.run.distillation.kl_budget is not None
            try:
                # What is within the budget is told by the first process: others may round differently.
                candidates = gathered(candidates_within_budget(auto, self.run.distillation.kl_budget, scores))[0]
            except UnreachableBudget as error:
                raise UserError(f"distill.kl_budget: {error}") from error
            batches = list(data.batcher.batches(data.prompt_plan.previewed, auto.samples, "choice", *started_ranks()))
            trainer = self.run.builder.trainer("signal_selection", logger=False)
            paths = {name: path for name, path in self.run.policies(number).items() if name in scores}
            models = load_models(paths, trainer, self.run.dtype)
            with trainer.precision_plugin.forward_context():
                rows = preview(candidates, models, scores, batches, gathered)
            best: Preview = gathered(choose(rows))[0]
            return {
                "name": best.candidate.name,
                "terms": [asdict(term) for term in best.candidate.signal.terms],
                "budget": best.candidate.budget or best.kl_on_stored_states,
                "rollouts": sum(row.samples for row in rows),
                "candidates": [row.record() for row in rows],
            }

        about = f"choosing among {len(auto.candidates())} signals by decoding from them"
        return self.stages.run("signal_selection", number, folder, about, inputs, body)

    def distill(self, number: int, inputs: dict[str, str], selection: Record | None) -> Record:
        """Distil the signal into the student."""
        folder = self.run.round_dir(number) / "distill"
        chosen: Record = {}
        if selection is not None:
            chosen = {"signal": Signal([Term(**term) for term in selection["terms"]]), "kl_budget": selection["budget"]}

        def body() -> Record:
            references = {"base": str(self.run.student(number - 1))}
            if "first" in self.run.scored(number):
                references["first"] = str(self.run.student(0))
            policies = {name: str(path) for name, path in self.run.scored(number).items()}
            module = self.run.builder.module(
                "distill", policy=self.run.student(number - 1), references=references, policies=policies, **chosen
            )
            assert isinstance(module, DistillModule)
            data = self.run.data(number, with_scores=True)
            warnings = self.stages.fit("distill", folder, module, data)
            own = data.train_data.finished_stores if module.iterations > 1 else []
            on_policy = sum(Store.open(path).rows for path in own)
            module.export(self.run.student(number), tokenizer=self.run.student(0))
            budget = module.budget
            return {
                "policy": policy_fingerprint(self.run.student(number)),
                "warnings": warnings,
                "spending": {
                    "budget": budget.kl_budget,
                    "total_budget": budget.total_budget,
                    "effective_budget": budget.effective_budget,
                    "beta": budget.beta,
                    "beta_first": None if budget.solution is None else budget.solution.beta_first,
                    "kl_on_stored_states": None if budget.solution is None else budget.solution.kl_base,
                    "on_policy_rollouts": on_policy,
                    "alpha": None if budget.fit is None else budget.fit.alpha,
                    "kl_on_calibration_prompts": None if budget.measured is None else budget.measured.kl,
                    "kl_on_calibration_prompts_stderr": None if budget.measured is None else budget.measured.stderr,
                },
            }

        about = "distilling the signal back into the base policy under the KL budget"
        return self.stages.run("distill", number, folder, about, inputs, body, policy=self.run.student(number))


def _told(record: Record, lines: list[str]) -> Record:
    """The record, once the user is told of it."""
    for line in lines:
        say(line)
    return record


def _check_store(path: Path) -> None:
    """Refuse the store of a finished stage that was altered since, or what its rollouts were scored again with.

    Raises:
        UserError: Names the file, and how only what is damaged is made again.
    """
    try:
        rescored_store(Store.open(path))
    except UserError as error:
        raise UserError(
            f"{error}. Restore it, or delete {MANIFEST} beside it and the stage's stage.json: fit makes that part again"
        ) from error
