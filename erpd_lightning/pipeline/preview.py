"""`preview`: what a round's signal would give for some KL budgets, before a student is distilled. Ours."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from ..errors import InvalidArgument, UserError
from ..files import atomic_write
from ..models.policy import policy_fingerprint
from ..modules.distill import DistillModule
from ..objectives.signal import AutoSignal
from ..objectives.tilted_policy import UnreachableBudget
from ..report.drawing import draw_preview
from ..report.tables import format_preview
from .records import Record, load_record
from .rounds import Rounds
from .signal_search import Candidate, candidates_within_budget, load_models, preview, solve
from .stages import say

SHARES = (0.5, 1.0, 1.5, 2.0)
"""Parts and multiples of the configured budget that are previewed where none are given."""


class PreviewTrainer(Trainer):
    """A `Trainer` with the subcommand that Lightning's has not: on its device, in its precision."""

    @rank_zero_only
    def preview(self, rounds: Rounds, budgets: list[float] | None = None) -> None:
        """Decode from the distillation target for some KL budgets, and show accuracy against KL.

        Prints a table, and writes `preview.json` and `preview.png` into the round's directory.

        Args:
            rounds: The run; of its rounds the given one, or the last whose stage scoring is finished.
            budgets: KL budgets to preview, in nats per token, such as [0.02, 0.05]; null for 0.5, 1, 1.5 and 2 times
                distill.kl_budget.

        Raises:
            UserError: If the signal is not there, a policy is missing or was altered, nothing is held out, or a budget
                cannot be spent.
        """
        number = _round(rounds)
        folder = rounds.round_dir(number)
        module = rounds.builder.module("distill", policy="")
        assert isinstance(module, DistillModule)
        names = {"base", *module.signal.policies}
        paths = {name: path for name, path in rounds.policies(number).items() if name in names}
        rounds.check_policies(dict.fromkeys([*paths.values(), rounds.student(0)]))  # Its tokenizer is everyone's.
        data = rounds.data(number, with_scores=True)
        prompts = data.prompt_plan.held_out
        if not prompts:
            raise UserError("data.validation_prompts is missing: a preview is measured on held-out prompts")
        try:
            data.check_temperature()
        except InvalidArgument as error:
            raise rounds.builder.named("preview", error) from error
        if missing := names - data.rollouts.scores.keys():
            raise UserError(
                f"distill.signal uses the policies {', '.join(sorted(missing))}, which are not scored in "
                f"{folder / 'scoring'}; there are {', '.join(sorted(data.rollouts.scores))}"
            )
        scores = {name: data.rollouts.flat_scores(name) for name in names}
        candidates = _candidates(module, budgets, scores)
        batches = list(data.batcher.batches(prompts, data.validation_samples, "preview"))
        say(
            f"[round {number}/{rounds.rounds}] preview: decoding from {len(candidates)} targets, "
            f"{data.validation_samples} responses to each of {len(prompts)} held-out prompts"
        )
        models = self._models(rounds, number, paths)
        try:
            with self.precision_plugin.forward_context():
                rows = preview(candidates, models, scores, batches)
        except UnreachableBudget as error:
            raise UserError(f"budgets: {error}") from error
        content: Record = {
            "round": number,
            "seed": rounds.seed,
            "prompts": len(prompts),
            "samples_per_prompt": data.validation_samples,
            "signal": [asdict(term) for term in module.signal.terms],
            "previews": [row.record() for row in rows],
            "policies": _evaluated(folder, [*rounds.policies(number), "student"]),
        }
        atomic_write(folder / "preview.json", json.dumps(content, indent=2) + "\n")
        say(format_preview(content["previews"], content["policies"]))
        _draw(folder / "preview.png", content)

    def _models(self, rounds: Rounds, number: int, paths: Mapping[str, Path | str]) -> dict[str, Any]:
        """The language models that were scored, on the trainer's device.

        Raises:
            UserError: If one of them has changed since.
        """
        scored = _record(rounds, number)["inputs"]
        for name, path in paths.items():
            if policy_fingerprint(path) != scored[name]:
                raise UserError(f"{path} is not the policy that the stage scoring of round {number} scored")
        return load_models(paths, self, rounds.dtype)


def _round(rounds: Rounds) -> int:
    """The round to preview.

    Raises:
        UserError: If its stage scoring is not finished.
    """
    numbers = range(rounds.rounds, 0, -1) if rounds.round is None else [rounds.round]
    for number in numbers:
        if _scoring_record(rounds, number).is_file():
            return number
    where = f"no round of {rounds.run_dir}" if rounds.round is None else f"round {rounds.round} of {rounds.run_dir}"
    raise UserError(
        f"{where} has no finished stage scoring, whose scores a preview reads: run fit --stage scoring first"
    )


def _scoring_record(rounds: Rounds, number: int) -> Path:
    return rounds.round_dir(number) / "scoring" / "stage.json"


def _record(rounds: Rounds, number: int) -> Record:
    return load_record(_scoring_record(rounds, number))


def _candidates(
    module: DistillModule, budgets: Sequence[float] | None, scores: Mapping[str, Tensor]
) -> list[Candidate]:
    """The configured signal on each budget, or all that it is to be chosen from.

    Raises:
        UserError: If there is none, or one of them is not positive.
    """
    if budgets is None:
        spent = module.kl_budget
        if spent is None:
            spent = solve(Candidate("distill.beta", module.signal, beta=module.beta), scores).kl
        budgets = [share * spent for share in SHARES]
    if not budgets or not all(0 < budget < float("inf") for budget in budgets):
        given = ", ".join(f"{budget:g}" for budget in budgets)
        raise UserError(f"budgets is [{given}]: at least one is needed, each a positive number of nats per token")
    if isinstance(module.signal, AutoSignal):
        found = [
            candidate for budget in budgets for candidate in candidates_within_budget(module.signal, budget, scores)
        ]
        return list({(candidate.name, candidate.budget): candidate for candidate in found}.values())
    name = " + ".join(f"{term.numerator}/{term.denominator}" for term in module.signal.terms)
    return [Candidate(name, module.signal, budget) for budget in budgets]


def _evaluated(folder: Path, names: Sequence[str]) -> dict[str, Record]:
    """What is known of the round's policies from its stage evaluation."""
    paths = {name: folder / "evaluation" / name / "stage.json" for name in names}
    return {name: load_record(path)["outcome"] for name, path in paths.items() if path.is_file()}


def _draw(path: Path, content: Mapping[str, Any]) -> None:
    try:
        image = draw_preview(content["previews"], content["policies"], f"Round {content['round']}")
    except ImportError:
        say(f"{path} is not drawn: matplotlib is not installed (pip install 'erpd-lightning[report]')")
        return
    atomic_write(path, image)
    say(f"The drawing lies in {path}")
