"""`evaluate`: any policy on held-out prompts and evaluation sets, without a run."""

import json
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from ..data.evaluation_sets import HELD_OUT, Evaluation, EvaluationData
from ..data.rollouts import RolloutDataModule
from ..errors import UserError
from ..files import atomic_write
from ..models.policy import policy_fingerprint
from ..modules.evaluation import EvaluationModule
from ..report.tables import format_sets
from .evaluation import logged, measure_set, under_set_names
from .preview import PreviewTrainer
from .records import Record, check_policy, recorded_in
from .stages import say


class CommandTrainer(PreviewTrainer):
    """A `Trainer` with the subcommands that Lightning's has not: `preview` and `evaluate`."""

    def evaluate(
        self,
        policy: str,
        data: RolloutDataModule,
        evaluation: Evaluation,
        dtype: str,
        reference: str | None = None,
        output: Path | None = None,
    ) -> None:
        """Evaluate a policy, which need not be of a run, on held-out prompts and evaluation sets.

        Prints a table. Nothing is written but the file that is asked for.

        Args:
            policy: Folder or hub name of the policy.
            data: Holds the held-out prompts, where there are any.
            evaluation: Holds the sets.
            dtype: Data type of the weights, as in `torch`.
            reference: Folder or hub name of a policy that the KL is measured to, on the held-out prompts, which are
                answered as rollouts are; null to measure none.
            output: JSON file to write what was measured to; null for none.

        Raises:
            UserError: If there is nothing to evaluate on, or the policy is not the one that its run recorded.
        """
        if not data.prompt_plan.held_out and not evaluation.sets:
            raise UserError(
                "data.validation_prompts is missing, and so is evaluation.sets: there is nothing to evaluate on"
            )
        if output is not None and output.is_dir():
            raise UserError(f"output {output} is a folder: the name of a file is expected")
        for path in {policy, reference or policy}:
            if (folder := recorded_in(path)) is not None:
                check_policy(path, folder)
        references = {} if reference is None else {"base": reference}
        content: Record = {"policy": policy, "fingerprint": policy_fingerprint(policy), "reference": reference}
        module = EvaluationModule(policy, references=references, dtype=dtype)
        rows: dict[str, Record] = {}
        if held_out := data.prompt_plan.held_out:
            say(f"[evaluate] {data.validation_samples} responses to each of {len(held_out)} held-out prompts")
            self.test(module, datamodule=data, verbose=False)
            sizes = {"prompts": len(held_out), "samples_per_prompt": data.validation_samples}
            content[HELD_OUT] = {**logged(self), **sizes, "temperature": data.sampler.temperature}
            rows[HELD_OUT] = under_set_names(content[HELD_OUT])
        sets: dict[str, Record] = {}
        for name, evaluation_set in evaluation.sets.items():
            of_set = EvaluationData(name, evaluation_set, data)
            say(f"[evaluate] {name}: {evaluation_set.samples} responses to each of {len(of_set.prompts)} prompts")
            on_set = EvaluationModule(policy, references={}, dtype=dtype)
            if hasattr(module, "policy"):
                on_set.policy = module.policy
            sets[name] = measure_set(on_set, of_set, self)
            module = on_set
        content["evaluation_sets"] = sets
        label = Path(policy).name
        say(format_sets({name: {label: row} for name, row in {**rows, **sets}.items()}))
        if HELD_OUT in content:
            say(_kl_line(content[HELD_OUT], reference))
        if output is not None:
            _write(output, content)
            say(f"What was measured lies in {output}")


def _kl_line(row: Record, reference: str | None) -> str:
    """What the held-out prompts say besides: KL and entropy are of the rollouts' own sampling."""
    entropy = f"entropy {row['entropy_per_token']:.3f} nats per token"
    sampling = f"{HELD_OUT}: drawn as rollouts are, at temperature {row['temperature']:g}; {entropy}"
    if reference is None:
        return f"{sampling}; KL not measured, which takes --reference"
    return f"{sampling}, KL to {reference} {row['kl_per_token']:.4f} ± {row['kl_per_token_stderr']:.4f} nats per token"


@rank_zero_only
def _write(path: Path, content: Record) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"output {path} cannot be written: {error.strerror}") from error
