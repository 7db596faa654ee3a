"""Evaluation sets: prompts with a sampling and a verifier of their own, on which policies are compared."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from ..errors import InvalidArgument, UserError, check_at_least
from .predict_data import BatchList
from .prompt_data import PromptDataModule
from .prompts import PromptSet
from .ranks import ranks
from .samplers import Sampler, TruncatedSampler
from .settings import settings_of
from .sources import PromptSource, fingerprint_of
from .verifiers import Verifier

HELD_OUT = "held_out"
"""What the held-out prompts of `data.validation_prompts` are called among sets: no set can have that name."""

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class EvaluationSet:
    """Prompts that policies are evaluated on, how they are answered, and how the answers are checked.

    Accuracy and length are measured, KL and entropy are not: those are of the rollouts' own sampling, on the held-out
    prompts.

    Attributes:
        prompts: File or data set, or a `PromptSource`, as `RolloutDataModule` takes it.
        samples: Responses to each prompt: the k of avg@k, pass@k and majority@k.
        temperature: What the logits are divided by.
        top_p: Probability of the likeliest tokens that are drawn from, at least; 1 for all tokens.
        top_k: Number of the likeliest tokens that are drawn from; 0 for all tokens, 1 for greedy decoding.
        max_new_tokens: Longest response in tokens; None for that of the rollouts.
        max_prompts: Prompts that are used, the first ones; None for all of them.
        verifier: Checks the responses; None for that of the rollouts.

    Raises:
        InvalidArgument: For a value out of range.
    """

    prompts: PromptSource | str | Path
    samples: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int | None = None
    max_prompts: int | None = None
    verifier: Verifier | None = None

    def __post_init__(self) -> None:
        if self.temperature == 0:
            raise InvalidArgument("temperature", "is 0: it must be above 0; top_k: 1 is greedy decoding")
        check_at_least(1, samples=self.samples, max_prompts=self.max_prompts, max_new_tokens=self.max_new_tokens)
        self.sampler(TruncatedSampler())

    def sampler(self, rollouts: Sampler) -> TruncatedSampler:
        """What draws the responses; what the set does not say is that of the rollouts' sampler."""
        longest = self.max_new_tokens or rollouts.max_new_tokens
        return TruncatedSampler(
            longest, self.temperature, rollouts.batch_size, self.top_p, self.top_k, stop=rollouts.stop
        )


@dataclass(frozen=True)
class Evaluation:
    """Which policies of a round are evaluated, and on which sets beside the held-out prompts.

    Attributes:
        sets: The sets by name.
        policies: Names of the policies: `base`, `teacher`, `unlearned`, those of `teachers`, and `student`, which is
            always among them; None for all of the round's.

    Raises:
        InvalidArgument: For a set whose name is no name of a folder, or is taken.
    """

    sets: Mapping[str, EvaluationSet] = field(default_factory=dict)
    policies: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in self.sets:
            if name == HELD_OUT or not NAME.fullmatch(name):
                raise InvalidArgument(
                    f"sets.{name}",
                    f"has no name for a set: letters, digits and _.- are expected, and {HELD_OUT} means "
                    "data.validation_prompts",
                )


class EvaluationData(LightningDataModule):
    """The prompts of an evaluation set, for `Trainer.test` of an `EvaluationModule`.

    Args:
        name: Name of the set; draws are a function of it.
        evaluation_set: The set.
        data: Data module of the run, for tokenizer, seed, and what the set does not say.
    """

    def __init__(self, name: str, evaluation_set: EvaluationSet, data: PromptDataModule) -> None:
        super().__init__()
        self.set_name = name
        self.set = evaluation_set
        self.data = data
        self.sampler = evaluation_set.sampler(data.sampler)
        self.verifier = evaluation_set.verifier or data.verifier

    @cached_property
    def prompts(self) -> PromptSet:
        """The set's prompts."""
        return self.data.prompt_set(self.set.prompts, self.set.max_prompts)

    def settings(self) -> dict[str, Any]:
        """All that the responses and verdicts depend on, apart from the policy and the seed, as JSON values."""
        return {
            "prompts": fingerprint_of(self.prompts),
            "samples": self.set.samples,
            "sampler": self.sampler.settings(),
            "verifier": settings_of(self.verifier),
            "correct_threshold": self.data.correct_threshold,
        }

    def test_dataloader(self) -> BatchList:
        """This rank's prompts.

        Raises:
            UserError: If a prompt and its response do not fit the policy's context.
        """
        assert self.trainer is not None
        batcher = dataclasses.replace(
            self.data.batcher, sampler=self.sampler, verifier=self.verifier, answers_only=True
        )
        purpose = f"evaluation {self.set_name}"
        try:
            batches = batcher.batches(self.prompts, self.set.samples, purpose, *ranks(self.trainer))
        except InvalidArgument as error:
            raise UserError(f"evaluation.sets.{self.set_name}.max_new_tokens {error.problem}") from error
        return BatchList(batches, sum(batches.responses))
