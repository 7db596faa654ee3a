"""The stage evaluation: the policies of a round on held-out prompts and on evaluation sets.

On the held-out prompts responses are drawn as rollouts are, and KL and entropy are measured too. Evaluation sets say
themselves how they are answered: there it is accuracy and length alone.
"""

from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

from ..data.evaluation_sets import EvaluationData
from ..data.samples import SAMPLES_FILE, copy_samples_of_base
from ..models.policy import Policy
from ..modules.evaluation import EvaluationModule, EvaluationWithSamples
from .records import Record, load_record
from .run import Run
from .stages import Stages

TO_ITSELF = ("kl_per_token", "kl_per_token_stderr", "kl_per_response", "kl_per_response_stderr")
"""What is zero of a policy that is its round's base policy."""


@dataclass
class RoundEvaluation:
    """Evaluates the policies of a round, each on each set as a stage of its own.

    Args:
        run: The run.
        stages: Runs a stage, or skips it.
    """

    run: Run
    stages: Stages

    def evaluate(self, number: int, inputs: dict[str, str]) -> None:
        """Measure every policy of the round that is asked for, on fresh samples."""
        sets = self.run.evaluation.sets.items()
        data = [EvaluationData(name, evaluation_set, self.run.data(number)) for name, evaluation_set in sets]
        for name, path in self.run.evaluated(number).items():
            loaded: list[Policy] = []  # By the first stage that is not done yet, for those that follow.
            self._on_held_out(number, name, path, inputs, loaded)
            for of_set in data:
                self._on_set(number, name, path, inputs, of_set, loaded)

    def _on_held_out(
        self, number: int, name: str, path: Path | str, inputs: dict[str, str], loaded: list[Policy]
    ) -> None:
        folder = held_out_folder(self.run.round_dir(number), name)
        earlier = held_out_folder(self.run.round_dir(number - 1), "student")
        known = self._known(earlier, number, name, inputs)

        def body() -> Record:
            if known is not None:
                _take_samples(earlier, folder)
                return {**known, **dict.fromkeys(TO_ITSELF, 0.0)}
            data = self.run.data(number)
            references = {"base": str(self.run.student(number - 1)), "first": str(self.run.student(0))}
            module = EvaluationWithSamples(path, references, folder / SAMPLES_FILE, dtype=self.run.dtype)
            trainer = self._trainer(folder)
            trainer.test(module, datamodule=data, verbose=False)
            loaded.append(module.policy)
            sizes = {"prompts": len(data.prompt_plan.held_out), "samples_per_prompt": data.validation_samples}
            return {**logged(trainer), **sizes}

        about = f"measuring {name} on fresh samples for held-out prompts" if known is None else _taken(name, number)
        prints = {key: inputs[key] for key in ("base", name)}
        self.stages.run("evaluation", number, folder, about, prints, body, files=[folder / SAMPLES_FILE])

    def _on_set(
        self,
        number: int,
        name: str,
        path: Path | str,
        inputs: dict[str, str],
        data: EvaluationData,
        loaded: list[Policy],
    ) -> None:
        folder = set_folder(self.run.round_dir(number), data.set_name, name)
        known = self._known(set_folder(self.run.round_dir(number - 1), data.set_name, "student"), number, name, inputs)

        def body() -> Record:
            if known is not None:
                return known
            module = EvaluationModule(path, references={}, dtype=self.run.dtype)
            if loaded:
                module.policy = loaded[0]
            outcome = measure_set(module, data, self._trainer(folder))
            loaded[:] = [module.policy]
            return outcome

        about = f"measuring {name}" if known is None else _taken(name, number)
        about = f"{about} on {data.set_name}"
        settings = {**self.run.builder.settings("evaluation_set"), "set": data.settings()}
        self.stages.run("evaluation", number, folder, about, {name: inputs[name]}, body, settings=settings)

    def _known(self, folder: Path, number: int, name: str, inputs: dict[str, str]) -> Record | None:
        """What is known of a round's base policy, as the student of the round before; None where nothing is.

        That record was compared with the settings when its own round was evaluated.
        """
        record = folder / "stage.json"
        if name != "base" or number == 1 or not record.is_file():
            return None
        found = load_record(record)
        if found["inputs"].get("student") != inputs["base"]:
            return None
        return {**found["outcome"], "measured_as": f"student of round {number - 1}"}

    def _trainer(self, folder: Path) -> Trainer:
        return self.run.builder.trainer("evaluation", default_root_dir=folder, logger=False)


def measure_set(module: EvaluationModule, data: EvaluationData, trainer: Trainer) -> Record:
    """Accuracy and lengths of a policy on an evaluation set."""
    trainer.test(module, datamodule=data, verbose=False)
    sampler = data.sampler
    return {
        **under_set_names(logged(trainer)),
        "prompts": len(data.prompts),
        "samples_per_prompt": data.set.samples,
        "temperature": sampler.temperature,
        "top_p": sampler.top_p,
        "top_k": sampler.top_k,
        "max_new_tokens": sampler.max_new_tokens,
    }


def under_set_names(measured: Record) -> Record:
    """The same with pass@1 as avg@k, which it is called where k differs from set to set."""
    return {key.replace("pass@1", "avg@k"): value for key, value in measured.items()}


def logged(trainer: Trainer) -> Record:
    """What a test logged, by the names of `test/…` in docs/metrics.md."""
    return {key.removeprefix("test/"): float(value) for key, value in trainer.callback_metrics.items()}


def _taken(name: str, number: int) -> str:
    return f"taking over what was measured of {name} as the student of round {number - 1}"


@rank_zero_only
def _take_samples(source: Path, target: Path) -> None:
    copy_samples_of_base(source / SAMPLES_FILE, target / SAMPLES_FILE)


def held_out_folder(round_dir: Path, policy: str) -> Path:
    """Where the evaluation of a policy on held-out prompts lies."""
    return round_dir / "evaluation" / policy


def set_folder(round_dir: Path, of_set: str, policy: str) -> Path:
    """Where the evaluation of a policy on an evaluation set lies."""
    return round_dir / "evaluation_sets" / of_set / policy
