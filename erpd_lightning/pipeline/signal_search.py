"""Candidates for the distillation target, previewed by decoding from them directly. Ours.

The student ends about where decoding from its target leads, so a signal and a budget can be judged in seconds,
before anything is distilled.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from ..data.prompt_batches import PromptBatch
from ..data.samplers.tilted import TiltedSampler
from ..metrics import clustered_ratio
from ..models.policy import load_policy
from ..objectives.signal import AutoSignal, Signal
from ..objectives.tilted_policy import BetaSolution, UnreachableBudget, mean_tilted_kl, solve_beta


@dataclass(frozen=True)
class Candidate:
    """A target that a student could be distilled to.

    The teacher itself is `teacher/base` of weight 1, unclipped, at beta = 1.

    Args:
        name: What to call it.
        signal: What tilts the base policy.
        budget: KL to the base policy to spend on the stored states, in nats per token; None where beta is given.
        beta: Price of a nat of KL; None where it is solved for the budget.

    Raises:
        ValueError: For a budget or beta that is not a positive number, both or none of them.
    """

    name: str
    signal: Signal
    budget: float | None = None
    beta: float | None = None

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.beta is None):
            raise ValueError(f"{self.name} needs either a budget or a beta")
        for kind, value in (("budget", self.budget), ("beta", self.beta)):
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{self.name} has the {kind} {value}: it must be a positive, finite number")


@dataclass(frozen=True)
class Preview:
    """What decoding from a candidate showed; standard errors count prompts, not samples.

    Attributes:
        candidate: The candidate.
        beta: Its beta, given or solved.
        kl_on_stored_states: KL of the target to the base policy on the stored states, in nats per token.
        pass_at_1: Mean reward of the responses.
        pass_at_1_stderr: Its standard error.
        kl_per_token: KL of the target to the base policy on the responses, exact over the vocabulary, in nats
            per token.
        kl_per_token_stderr: Its standard error.
        entropy_per_token: Entropy of the target on the responses, in nats per token.
        mean_length: Tokens of a response.
        samples: Responses in all.
        correct: Correct responses to each prompt.
        responses: Responses to each prompt.
    """

    candidate: Candidate
    beta: float
    kl_on_stored_states: float
    pass_at_1: float
    pass_at_1_stderr: float
    kl_per_token: float
    kl_per_token_stderr: float
    entropy_per_token: float
    mean_length: float
    samples: int
    correct: tuple[float, ...]
    responses: tuple[float, ...]

    def record(self) -> dict[str, Any]:
        """By the keys of `summary.json`."""
        return {
            "candidate": self.candidate.name,
            "budget": self.candidate.budget,
            "beta": self.beta,
            "kl_on_stored_states": self.kl_on_stored_states,
            "pass@1": self.pass_at_1,
            "pass@1_stderr": self.pass_at_1_stderr,
            "kl_per_token": self.kl_per_token,
            "kl_per_token_stderr": self.kl_per_token_stderr,
            "entropy_per_token": self.entropy_per_token,
            "mean_length": self.mean_length,
            "samples": self.samples,
        }


def preview(
    candidates: Sequence[Candidate],
    models: Mapping[str, Any],
    scores: Mapping[str, Tensor],
    batches: Sequence[PromptBatch],
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> list[Preview]:
    """Decode from each candidate and measure what it gains and spends, in the order that they are given.

    All betas are solved before anything is sampled. Every candidate meets the same draws, so that what tells two
    of them apart is less noisy than each of them.

    Args:
        candidates: The targets.
        models: `base` and the policies that the signals compare, as language models on one device.
        scores: Of the same policies, `(N, K+1)` log-probs of support and tail on the stored states, in nats.
        batches: Prompts, at least one, with sampler, verifier and seed; where several processes share them, this one's.
        gather: What each of the processes has, by rank; see `gathered`.

    Raises:
        UnreachableBudget: For a budget that no beta spends.
    """
    # Processes may round differently: all of them decode from what the first one solved.
    solutions: list[BetaSolution] = gather([solve(candidate, scores) for candidate in candidates])[0]
    previews = []
    for candidate, solution in zip(candidates, solutions, strict=True):
        own = {
            batch.index: _prompt_sums(TiltedSampler(batch.sampler, candidate.signal, solution.beta), models, batch)
            for batch in batches
            if batch.prompts
        }
        parts = {index: sums for each in gather(own) for index, sums in each.items()}
        previews.append(_summarise(candidate, solution, [parts[index] for index in sorted(parts)]))
    return previews


def load_models(paths: Mapping[str, str | Path], trainer: Trainer, dtype: str = "float32") -> dict[str, Any]:
    """Policies to decode from, by name, as language models on a trainer's device and in its precision.

    Args:
        paths: Where they lie.
        trainer: The trainer.
        dtype: Data type of their weights, as in `torch`.
    """
    device, convert = trainer.strategy.root_device, trainer.precision_plugin.convert_module
    return {name: convert(load_policy(path, dtype)).to(device).model for name, path in paths.items()}


def choose(rows: Sequence[Preview]) -> Preview:
    """The first candidate that is not worse than the best by more than a standard error of their difference.

    All of them answered the same prompts, so the difference is taken prompt by prompt. Among candidates that a few
    samples cannot tell apart the order decides, which is not noise; of the best, the first.
    """
    best = max(rows, key=lambda row: row.pass_at_1)
    responses, correct = torch.tensor(best.responses), torch.tensor(best.correct)
    behind = (clustered_ratio(correct - torch.tensor(row.correct), responses) for row in rows)
    return next(row for row, by in zip(rows, behind, strict=True) if row is best or bool(by.value <= by.stderr))


def candidates_within_budget(auto: AutoSignal, budget: float, scores: Mapping[str, Tensor]) -> list[Candidate]:
    """The candidates of a signal that is to be chosen whose target can spend what it should, and not more.

    Args:
        auto: Says which there are.
        budget: The KL budget that shares are of, in nats per token.
        scores: By policy, `(N, K+1)` log-probs of support and tail, in nats.

    Raises:
        UnreachableBudget: If there are none.
    """
    found = []
    for name, signal, share in auto.candidates():
        candidate = Candidate(name, signal, beta=1.0) if share is None else Candidate(name, signal, share * budget)
        try:
            spent = solve(candidate, scores).kl
        except UnreachableBudget:
            continue
        if share is not None or spent <= budget:
            found.append(candidate)
    if not found:
        raise UnreachableBudget(f"no candidate of the signal spends a KL budget of {budget:g} nats per token")
    return found


def solve(candidate: Candidate, scores: Mapping[str, Tensor]) -> BetaSolution:
    """The candidate's beta, and the KL to the base policy that it spends on the stored states.

    Args:
        candidate: The target.
        scores: By policy, `(N, K+1)` log-probs of support and tail, in nats.

    Raises:
        UnreachableBudget: If no beta spends the budget.
    """
    base, signal = scores["base"], candidate.signal(scores)
    if candidate.budget is not None:
        return solve_beta(base, signal, candidate.budget)
    assert candidate.beta is not None
    return BetaSolution(beta=candidate.beta, kl=mean_tilted_kl(base, signal, candidate.beta))


def _summarise(candidate: Candidate, solution: BetaSolution, sums: Sequence[Mapping[str, Tensor]]) -> Preview:
    """What the sums over each prompt's responses show, those of all batches."""
    total = {name: torch.cat([part[name] for part in sums]) for name in sums[0]}
    passed = clustered_ratio(total["correct"], total["samples"])
    kl = clustered_ratio(total["kl"], total["tokens"])
    return Preview(
        candidate=candidate,
        beta=solution.beta,
        kl_on_stored_states=solution.kl,
        pass_at_1=float(passed.value),
        pass_at_1_stderr=float(passed.stderr),
        kl_per_token=float(kl.value),
        kl_per_token_stderr=float(kl.stderr),
        entropy_per_token=float(clustered_ratio(total["entropy"], total["tokens"]).value),
        mean_length=float(clustered_ratio(total["tokens"], total["samples"]).value),
        samples=int(total["samples"].sum()),
        correct=tuple(total["correct"].tolist()),
        responses=tuple(total["samples"].tolist()),
    )


def _prompt_sums(sampler: TiltedSampler, models: Mapping[str, Any], batch: PromptBatch) -> dict[str, Tensor]:
    """Sums over each prompt's responses, `(prompts,)` each: correct ones, KL and entropy in nats, tokens, number."""
    repeated = [i for i in range(len(batch.prompts)) for _ in range(batch.samples)]
    drawn = sampler.sample(models, batch.tokenizer, [batch.prompt_ids[i] for i in repeated], batch.seed)
    rewards = batch.verify([row.response for row in drawn], repeated).rewards
    columns: dict[str, Any] = {
        # What could not be checked is not correct. In the precision of stores, in which evaluation compares.
        "correct": np.array([np.nan if reward is None else reward for reward in rewards], np.float32)
        >= np.float32(batch.correct_threshold),
        "kl": [sum(row.kl) for row in drawn],
        "entropy": [sum(row.entropy) for row in drawn],
        "tokens": [float(len(row.response.ids)) for row in drawn],
        "samples": [1.0 for _ in drawn],
    }
    return {
        name: torch.tensor(column, dtype=torch.float64).view(-1, batch.samples).sum(1)
        for name, column in columns.items()
    }
