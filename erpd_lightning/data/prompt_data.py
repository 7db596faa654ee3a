"""`PromptDataModule`: prompts that are tokenised, shared out, and answered afresh in validation and testing."""

import math
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from ..errors import InvalidArgument, check_at_least
from ..models.loading import context_length, load_tokenizer
from .predict_data import BatchList
from .prompt_batches import PromptBatcher
from .prompts import Message, PromptPlan, PromptSet, PromptSource, tokenize
from .ranks import ranks
from .samplers import Sampler
from .sources import check_sources, read_prompts
from .tokenize import check_chat_template_kwargs
from .verifiers import Verifier


class PromptDataModule(LightningDataModule):
    """Says which prompts are for what, and serves the held-out ones; it knows of no stored rollouts.

    The arguments are those of `RolloutDataModule`, which describes them.

    Raises:
        InvalidArgument: For a value out of range.
    """

    def __init__(
        self,
        *,
        tokenizer: str | Path,
        prompts: PromptSource | str | Path | None,
        validation_prompts: PromptSource | str | Path | None,
        chat_template_kwargs: dict[str, Any] | None,
        sampler: Sampler,
        verifier: Verifier,
        correct_threshold: float,
        judge_truncated: bool,
        prompts_per_round: int | None,
        round: int,
        preview_prompts: int,
        max_tokens: int,
        validation_samples: int,
        max_validation_prompts: int | None,
        max_evaluation_prompts: int | None,
        calibration_prompts: int,
        calibration_samples: int,
        seed: int,
    ) -> None:
        super().__init__()
        check_at_least(
            1,
            prompts_per_round=prompts_per_round,
            round=round,
            max_tokens=max_tokens,
            validation_samples=validation_samples,
            max_validation_prompts=max_validation_prompts,
            max_evaluation_prompts=max_evaluation_prompts,
            calibration_samples=calibration_samples,
        )
        check_at_least(0, calibration_prompts=calibration_prompts, preview_prompts=preview_prompts)
        if not math.isfinite(correct_threshold):
            raise InvalidArgument("correct_threshold", f"is {correct_threshold}: it must be a finite reward")
        check_sources(prompts, validation_prompts)
        check_chat_template_kwargs(chat_template_kwargs)
        self.tokenizer_path = tokenizer
        self.prompts = prompts
        self.validation_prompts = validation_prompts
        self.chat_template_kwargs = chat_template_kwargs
        self.sampler = sampler
        self.verifier = verifier
        self.correct_threshold = correct_threshold
        self.judge_truncated = judge_truncated
        self.prompts_per_round = prompts_per_round
        self.round = round
        self.preview_prompts = preview_prompts
        self.max_tokens = max_tokens
        self.validation_samples = validation_samples
        self.max_validation_prompts = max_validation_prompts
        self.max_evaluation_prompts = max_evaluation_prompts
        self.calibration_prompts = calibration_prompts
        self.calibration_samples = calibration_samples
        self.seed = seed

    def val_dataloader(self) -> list[BatchList]:
        """This rank's share of the held-out prompts that validation takes; no loader at all where there are none."""
        return self._held_out_loaders(self.max_validation_prompts)

    def test_dataloader(self) -> list[BatchList]:
        """This rank's held-out prompts; no loader at all where there are none."""
        return self._held_out_loaders(None)

    predict_dataloader = test_dataloader

    def _held_out_loaders(self, most: int | None) -> list[BatchList]:
        prompts = self.prompt_plan.held_out[:most]
        return [self._prompt_loader(prompts, self.validation_samples, "validation")] if prompts else []

    def calibration_batches(self, purpose: str) -> BatchList:
        """This rank's calibration prompts, to be answered with draws of their own for each purpose."""
        return self._prompt_loader(self.prompt_plan.calibration, self.calibration_samples, purpose)

    def _prompt_loader(self, prompts: PromptSet, samples: int, purpose: str) -> BatchList:
        assert self.trainer is not None
        batches = self.batcher.batches(prompts, samples, purpose, *ranks(self.trainer))
        return BatchList(batches, sum(batches.responses))

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the policies."""
        return load_tokenizer(self.tokenizer_path)

    @cached_property
    def batcher(self) -> PromptBatcher:
        """What cuts prompts into batches for a policy in memory."""
        return self.batcher_of(self.sampler.in_process, self.verifier)

    def batcher_of(self, sampler: Sampler, verifier: Verifier) -> PromptBatcher:
        """What cuts prompts into batches for a sampler and a verifier."""
        return PromptBatcher(
            tokenizer=self.tokenizer,
            sampler=sampler,
            verifier=verifier,
            max_tokens=self.max_tokens,
            context=context_length(self.tokenizer_path),
            seed=self.seed,
            correct_threshold=self.correct_threshold,
            judge_truncated=self.judge_truncated,
        )

    @cached_property
    def prompt_plan(self) -> PromptPlan:
        """Which prompts are for what."""
        return PromptPlan(
            train=self.prompts,
            validation=self.validation_prompts,
            encode=self._encode,
            per_round=self.prompts_per_round,
            round=self.round,
            previews=self.preview_prompts,
            max_validation=self.max_evaluation_prompts,
            max_calibration=self.calibration_prompts,
        )

    def prompt_set(self, source: PromptSource | str | Path, most: int | None = None) -> PromptSet:
        """Prompts of another source, tokenised as these are; the first `most` of them, or all.

        Raises:
            UserError: If they cannot be read.
        """
        return PromptSet(read_prompts(source, self._encode).prompts[:most], self._encode)

    def _encode(self, prompt: str | list[Message]) -> list[int]:
        return tokenize(self.tokenizer, prompt, self.chat_template_kwargs)
