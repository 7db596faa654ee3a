"""`RolloutGenerator`: how stored rollouts come to be, by sampling or from elsewhere, and are rescored."""

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from ..errors import InvalidArgument
from ..models.loading import vocabulary_size
from .import_data import ImportData
from .imports import ImportedRows, ImportSource
from .learner import Learner
from .predict_data import SamplingData, predict_to_store
from .prompt_batches import PromptBatches
from .prompt_data import PromptDataModule
from .rescoring import RescoringData
from .samplers import Sampler
from .settings import settings_of
from .train_rollouts import TrainRollouts
from .verifiers import Unverified, Verifier

Rescore = Literal["auto", "always", "never"]


class RolloutGenerator:
    """Makes the data modules for `Trainer.predict` whose predictions are rollouts, and runs them within a training.

    Args:
        data: Has the prompts, the sampler and the verifier.
        group_size: Responses to each prompt.
        imported: Responses from elsewhere that those of the first round are made of; None where they are sampled.
        rescore: Whether the trainer computes the log-probs once more; see `RolloutDataModule`.
        on_finish: Called when a store is finished.

    Raises:
        InvalidArgument: If `rescore` is none of its values.
    """

    def __init__(
        self,
        data: PromptDataModule,
        group_size: int,
        imported: ImportSource | None,
        rescore: Rescore,
        on_finish: Callable[[], None],
    ) -> None:
        if rescore not in ("auto", "always", "never"):
            raise InvalidArgument("rescore", f"is {rescore!r}: it must be auto, always or never")
        self.data = data
        self.group_size = group_size
        self.imported = imported
        self.rescore = rescore
        self.on_finish = on_finish

    @property
    def imports(self) -> bool:
        """Whether the round's rollouts are imported."""
        return self.imported is not None and self.data.round == 1

    @property
    def rescores(self) -> bool:
        """Whether the trainer computes the log-probs of what was sampled once more."""
        elsewhere = self.imported_rows.has_logps if self.imports else not self.data.sampler.needs_model
        return self.rescore == "always" or (self.rescore == "auto" and elsewhere)

    @cached_property
    def imported_rows(self) -> ImportedRows:
        """The responses from elsewhere, once all of them are checked.

        Raises:
            UserError: Names the row that is broken, or the column that is missing.
        """
        assert self.imported is not None
        return ImportedRows(self.imported, vocabulary_size(self.data.tokenizer_path))

    def generate(self, rollouts: TrainRollouts, verifier: Verifier, learner: Learner, trainer: Any) -> None:
        """Make a store of rollouts in the middle of a training, with the policy that is trained as it is.

        Args:
            rollouts: Those of the store that is missing.
            verifier: Checks the responses.
            learner: The module that is trained.
            trainer: The trainer of the training.
        """
        if self.imports and rollouts.iterations == 1:
            predict_to_store(self.importing(rollouts.store), learner, learner.token_logps, trainer)
        else:
            predict_to_store(self.sampling(rollouts, verifier), learner, learner.respond, trainer)
        if self.rescores:
            predict_to_store(self.rescoring(rollouts.store), learner, learner.token_logps, trainer)

    def sampling(self, rollouts: TrainRollouts, verifier: Verifier) -> SamplingData:
        """A data module that samples and verifies rollouts."""
        data = self.data
        # A policy that is being trained is in memory alone.
        sampler = data.sampler if rollouts.iterations == 1 else data.sampler.in_process
        settings = {
            "prompts": data.prompt_plan.train_fingerprint,
            "chat_template_kwargs": data.chat_template_kwargs,
            "prompts_per_round": data.prompts_per_round,
            "round": data.round,
            "iteration": rollouts.iteration,
            "iterations": rollouts.iterations,
            "preview_prompts": data.preview_prompts,
            "group_size": self.group_size,
            "sampler": settings_of(sampler),
            "verifier": settings_of(verifier),
            "judge_truncated": data.judge_truncated,
            "seed": data.seed,
        }
        # Strategies that spawn processes pickle what they are given: a function within a function could not be.
        batches = partial(self._batches, sampler, verifier, rollouts.iteration, rollouts.iterations)
        return SamplingData(sampler, batches, rollouts.store, settings, self.on_finish)

    def _batches(self, sampler: Sampler, verifier: Verifier, iteration: int, iterations: int) -> PromptBatches:
        purpose = "rollouts" if iterations == 1 else f"rollouts {iteration}"
        prompts = self.data.prompt_plan.sampled(iteration, iterations)
        return self.data.batcher_of(sampler, verifier).batches(prompts, self.group_size, purpose)

    def importing(self, store: Path) -> ImportData:
        """A data module that makes rollouts of the responses from elsewhere."""
        assert self.imported is not None
        verifier = self.data.verifier if self.imported.rewards == "verifier" else Unverified()
        settings = {
            "temperature": self.data.sampler.temperature,
            "verifier": settings_of(verifier),
        }
        batcher = self.data.batcher_of(self.data.sampler, verifier)
        return ImportData(self.imported_rows, batcher, store, settings, self.on_finish)

    def rescoring(self, store: Path) -> RescoringData:
        """A data module that stores the trainer's log-probs of rollouts.

        Raises:
            UserError: If these are not there.
        """
        return RescoringData(store, self.data.max_tokens, self.on_finish)
