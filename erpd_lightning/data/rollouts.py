"""`RolloutDataModule`: rollouts sampled once, kept in a store, and read again in every epoch."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn

from ..errors import InvalidArgument, UserError, check_at_least
from ..seeds import derive_seed
from .audit import WARNINGS, check_thresholds
from .batching import RolloutBatch, RolloutTable
from .import_data import ImportData
from .imports import ImportSource
from .learner import Learner
from .loader import StepLoader
from .predict_data import BatchList, SamplingData, ScoringData
from .prompt_data import PromptDataModule
from .prompts import PromptSource
from .rescoring import RescoringData
from .rollout_generator import Rescore, RolloutGenerator
from .samplers import Sampler, TransformersSampler
from .store import Store
from .train_loader import TrainLoader
from .train_rollouts import Baseline, OnPolicyRollouts, Select, TrainRollouts, select_all
from .verifiers import MathVerify, Unverified, Verifier


class RolloutDataModule(PromptDataModule):
    """Samples responses, verifies them, and serves the stored rollouts in batches.

    Training reads the store alone. Where it does not exist yet, a module of this package first samples it, as training
    begins, from the policy that is about to be trained; `sampling()` does only that, in a `Trainer.predict`. Validation
    and testing sample afresh from held-out prompts.

    A module hands itself over by `connect`, and says which of the responses enter its loss and whether it answers
    prompts itself; see `Learner`. For one that does not, all stored responses are served.

    With several `iterations`, training is on-policy: the round's prompts are cut into as many parts, and each part
    is answered by the policy as it is when its turn comes, into a store of its own. The trainer's `max_epochs` are
    shared out evenly, so that `max_epochs / iterations` epochs are trained on each part.

    A training batch is a micro-batch of an optimiser step of `batch_size` responses over all ranks. How many
    micro-batches that takes follows from `max_tokens`, and the trainer's `accumulate_grad_batches` is raised to
    it; it never changes the gradient.

    Args:
        store: Directory of the rollout store.
        tokenizer: Folder or hub name of the tokenizer: that of the base policy.
        prompts: Prompts to sample from: a file or data set with the columns `prompt` and `answer`, of which
            configuration and split can be named as in `openai/gsm8k?config=main&split=test` (without, its split is
            `train`), or a `PromptSource` for other columns and more; not needed where the store is complete.
        validation_prompts: Held-out prompts in the same way, of another split; None for no validation.
        chat_template_kwargs: Variables of the tokenizer's chat template, such as `enable_thinking: false`.
        scores: Directory with the stored scores of policies on the rollouts, for distillation.
        replay_stores: Rollout stores of the rounds before, the latest first.
        replay: How many of them are trained on again beside the round's own, each response with the log-probs of the
            policy that sampled it; 0 for none. They cost no sampling and no verification. What the scores are of, and
            hence what is distilled, is the round's own rollouts alone: the states that its base policy comes to.
        on_policy_store: Directory for the rollouts of a student that answers the prompts itself while it is distilled
            (`DistillModule.iterations`); they are not verified.
        sampler: Draws the responses.
        verifier: Checks the responses against the answers; by default `MathVerify`.
        imported: Responses that were generated elsewhere, with which the first round begins instead of sampling.
        rescore: Whether the trainer computes the log-probs of what was sampled once more, and importance ratios take
            these: `always`, `never`, or `auto` for where the sampler is another engine, such as a server, whose own
            differ, or imported responses come with log-probs. The sampler's stay beside them, and the gap between the
            two is reported.
        group_size: Responses to each prompt.
        baseline: What the reward of a response is compared with to give its advantage: the rewards of its `group`, as
            in GRPO, or those of its `batch`, as in REINFORCE++: of all rollouts of its round, or of its iteration. In
            a group of incorrect responses alone there is nothing to learn by comparison; beside the batch there is.
        correct_threshold: Reward from which a response counts as correct, in pass@k, in logged means and for objectives
            that tell correct responses from incorrect ones; advantages are of the rewards as they are.
        judge_truncated: Whether a response that was cut off at `max_new_tokens` is judged by what it says so far, as in
            TRL. Without, it counts as not checked: never as correct, and it enters neither loss nor baseline (TRL's
            `mask_truncated_completions`; the overlong filtering of DAPO).
        audit_warn: Above which values rollouts are warned of, by the names of `audit.MEASURES`: shares that are
            truncated, unscorable, duplicate or empty, of groups that are uniform, and the gap in nats between the
            log-probs of sampler and trainer. It goes over `audit.WARNINGS`.
        audit_stop: Above which values a run stops before it trains on them; none by default.
        prompts_per_round: Prompts to sample from in a round; None for all of them. Each round takes the next ones.
        round: The round, from 1, that says which prompts are next.
        preview_prompts: The last of the round's prompts, on which signals are previewed: no rollouts are sampled
            from them.
        iterations: Parts of the round's prompts, each answered by the policy as it is when its turn comes; 1 for
            fixed rollouts of the starting policy alone.
        batch_size: Responses per optimiser step, over all ranks and micro-batches.
        max_tokens: Padded tokens of a micro-batch, the bound on the memory that it takes.
        validation_samples: Fresh responses to each held-out prompt.
        max_validation_prompts: Held-out prompts that validation takes, which comes after every epoch, the first ones;
            None for all of them.
        max_evaluation_prompts: Held-out prompts that there are at all, for tests, evaluations and previews, the first
            ones; None for all of them.
        calibration_prompts: Training prompts outside the round on which a student's KL is measured while it is
            distilled, as many of them as there are; 0 for none. They are sampled, not verified rollouts.
        calibration_samples: Fresh responses to each of them.
        seed: Seed of sampling and shuffling.

    Raises:
        InvalidArgument: For a value out of range.
    """

    def __init__(
        self,
        store: str | Path,
        tokenizer: str | Path,
        prompts: PromptSource | str | Path | None = None,
        validation_prompts: PromptSource | str | Path | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        scores: str | Path | None = None,
        replay_stores: Sequence[str | Path] = (),
        replay: int = 0,
        on_policy_store: str | Path | None = None,
        sampler: Sampler | None = None,
        verifier: Verifier | None = None,
        imported: ImportSource | None = None,
        rescore: Rescore = "auto",
        group_size: int = 16,
        baseline: Baseline = "group",
        correct_threshold: float = 1.0,
        judge_truncated: bool = True,
        audit_warn: dict[str, float] | None = None,
        audit_stop: dict[str, float] | None = None,
        prompts_per_round: int | None = None,
        round: int = 1,
        preview_prompts: int = 0,
        iterations: int = 1,
        batch_size: int = 256,
        max_tokens: int = 16384,
        validation_samples: int = 8,
        max_validation_prompts: int | None = 256,
        max_evaluation_prompts: int | None = None,
        calibration_prompts: int = 512,
        calibration_samples: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            prompts=prompts,
            validation_prompts=validation_prompts,
            chat_template_kwargs=chat_template_kwargs,
            sampler=sampler or TransformersSampler(),
            verifier=verifier or MathVerify(),
            correct_threshold=correct_threshold,
            judge_truncated=judge_truncated,
            prompts_per_round=prompts_per_round,
            round=round,
            preview_prompts=preview_prompts,
            max_tokens=max_tokens,
            validation_samples=validation_samples,
            max_validation_prompts=max_validation_prompts,
            max_evaluation_prompts=max_evaluation_prompts,
            calibration_prompts=calibration_prompts,
            calibration_samples=calibration_samples,
            seed=seed,
        )
        check_at_least(1, group_size=group_size, iterations=iterations, batch_size=batch_size)
        check_at_least(0, replay=replay)
        if baseline not in ("group", "batch"):
            raise InvalidArgument("baseline", f"is {baseline!r}: it must be 'group' or 'batch'")
        if replay and iterations > 1:
            raise InvalidArgument(
                "replay",
                f"is {replay}, but iterations ({iterations}) is above 1: what is trained on-policy takes no earlier "
                "rollouts",
            )
        if imported is not None and iterations > 1:
            raise InvalidArgument(
                "imported", f"is given, but iterations ({iterations}) is above 1: the policy answers each part itself"
            )
        self.audit_warn = {**WARNINGS, **(audit_warn or {})}
        self.audit_stop = audit_stop or {}
        check_thresholds("audit_warn", self.audit_warn)
        check_thresholds("audit_stop", self.audit_stop)
        self.root = Path(store)
        self.scores = None if scores is None else Path(scores)
        self.replay_stores = [Path(path) for path in replay_stores]
        self.replay = replay
        self.on_policy_store = None if on_policy_store is None else Path(on_policy_store)
        self.imported = imported
        self.group_size = group_size
        self.baseline = baseline
        self.iterations = iterations
        self.batch_size = batch_size
        self.stored = self._stored_rollouts()
        self.train_data: TrainRollouts = self.stored
        self._generator = RolloutGenerator(self, group_size, imported, rescore, self.clear_cache)
        self._learner: Learner | None = None
        self._train_loader = TrainLoader()

    # The rollouts that there are, and those that are trained on.

    def _stored_rollouts(self) -> TrainRollouts:
        """The rollouts of the data module's own policy: fixed ones, or those of its iterations."""
        if self.iterations > 1:
            return OnPolicyRollouts(self.root, self.iterations, self.baseline, self.correct_threshold)
        # What the scores are of is the round's own rollouts alone.
        replayed = self.replay_stores[: self.replay] if self.scores is None else []
        return TrainRollouts([self.root, *replayed], self.scores, self.baseline, self.correct_threshold)

    @property
    def store(self) -> Path:
        """Where the stored rollouts lie; those of the iteration where there are several."""
        return self.stored.store

    @property
    def rollouts(self) -> RolloutTable:
        """The stored rollouts, with the scores of policies where there are any."""
        return self.stored.table

    def setup(self, stage: str) -> None:
        """Let go of the module of an earlier training: the one to come hands itself over, or is served everything."""
        if stage == "fit":
            self._learner = None
            self.train_data = self.stored

    def connect(self, learner: Learner) -> None:
        """Take the module that is trained; a module calls this in its `setup`.

        Raises:
            UserError: If the trainer's epochs cannot be shared out over its iterations, or a student's own rollouts
                have no place.
        """
        self._learner = learner
        self._train_loader = TrainLoader()
        self.train_data = self.stored
        if learner.iterations > 1:
            if self.on_policy_store is None:
                raise UserError(
                    f"iterations is {learner.iterations}: RolloutDataModule(on_policy_store=…) has to say where the "
                    "student's rollouts are to be kept"
                )
            self.train_data = OnPolicyRollouts(
                self.on_policy_store, learner.iterations, self.baseline, self.correct_threshold
            )
        if isinstance(self.train_data, OnPolicyRollouts):
            self.train_data.share_out(self.trainer)

    def check_groups(self, needs_groups: bool, objective: str = "the objective") -> None:
        """Whether an objective that compares responses has something to compare a response with.

        Args:
            needs_groups: Whether it compares them.
            objective: What to call it.

        Raises:
            InvalidArgument: If a group is all that it is compared with, and consists of it alone.
        """
        if needs_groups and self.baseline == "group" and self.group_size < 2:
            raise InvalidArgument(
                "group_size",
                f"is {self.group_size}: {objective} compares the responses of a group, which takes at least 2 "
                "(or baseline: batch)",
            )

    def check_temperature(self) -> None:
        """Whether what is sampled beside the stored rollouts is sampled as they were.

        Raises:
            InvalidArgument: If it is sampled at another temperature: the KL of the two would be of two policies.
        """
        stored, sampled = self.train_data.table.temperature, self.sampler.temperature
        if stored != sampled:
            raise InvalidArgument(
                "sampler.temperature",
                f"is {sampled:g}, but the stored rollouts were drawn at {stored:g}: KL and ratios hold at one "
                f"temperature, set it to {stored:g}",
            )

    def clear_cache(self) -> None:
        """Read the stores again when they are next needed: one of them has changed."""
        self.stored.clear_cache()
        self.train_data.clear_cache()

    # Predictions: sampling and scoring.

    def sampling(self) -> SamplingData:
        """A data module for `Trainer.predict` that samples and verifies the round's rollouts."""
        return self._generator.sampling(self.stored, self.verifier)

    def importing(self) -> ImportData:
        """A data module for `Trainer.predict` that makes the round's rollouts of responses from elsewhere."""
        return self._generator.importing(self.store)

    def scoring(self, name: str) -> ScoringData:
        """A data module for `Trainer.predict` that stores what the policy called `name` says of the rollouts.

        `base` comes first: its support is everyone's.

        Raises:
            UserError: If there is no directory for scores, or those of `base` are missing.
        """
        if self.scores is None:
            raise UserError("scoring needs a directory for the scores: RolloutDataModule(scores=…)")
        return ScoringData(name, self.root, self.scores, self.tokenizer_path, self.max_tokens, self.clear_cache)

    @property
    def rescores(self) -> bool:
        """Whether the trainer computes the log-probs of what was sampled once more."""
        return self._generator.rescores

    def rescoring(self) -> RescoringData:
        """A data module for `Trainer.predict` that stores the trainer's log-probs of the round's rollouts.

        Raises:
            UserError: If these are not there.
        """
        return self._generator.rescoring(self.store)

    def sample_for_epoch(self, epoch: int) -> None:
        """Sample the rollouts that an epoch is trained on with the learner as it is, unless they are there.

        To be called on every rank.

        Args:
            epoch: The epoch, from 0.
        """
        self.train_data.begin_epoch(epoch)
        if self._learner is not None and not Store.exists(self.train_data.store):
            self.check_groups(self._learner.needs_groups)
            # The answers of a student that is distilled are not verified.
            verifier = self.verifier if self.train_data is self.stored else Unverified()
            self._generator.generate(self.train_data, verifier, self._learner, self.trainer)

    # Loaders.

    def train_dataloader(self) -> StepLoader:
        """The rollouts that enter the module's loss, shuffled anew in each epoch.

        Raises:
            UserError: If there are none, none enters the loss, or validation would sample at another temperature.
        """
        trainer: Any = self.trainer
        self.train_data.begin_epoch(trainer.current_epoch)
        if not Store.exists(self.train_data.store):
            raise UserError(
                f"{self.train_data.store} holds no finished rollouts: sample them by Trainer.predict with sampling()"
            )
        if self.prompts is not None or self.validation_prompts is not None:
            self.check_temperature()
        return self._train_loader.make(
            trainer,
            self.train_data,
            select_all if self._learner is None else self._learner.select,
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
            seed=derive_seed(self.seed, "shuffle"),
        )

    def optimizer_steps(self, select: Select) -> int:
        """Optimiser steps of an epoch on the stored rollouts.

        Args:
            select: Says which of them enter the loss.
        """
        return -(-len(self.stored.selected(select)) // self.batch_size)

    def check_micro_batches(self) -> None:
        """See `TrainLoader`."""
        self._train_loader.check_micro_batches(self.trainer)

    def iterate_once(self) -> Iterator[RolloutBatch]:
        """This rank's share of what the trainer trains on, once, in as many micro-batches on every rank."""
        assert self._train_loader.steps is not None
        return self._train_loader.steps.iterate_once()

    def val_dataloader(self) -> list[BatchList]:
        """This rank's held-out prompts and, where a student is calibrated on them, unused training prompts."""
        assert self.trainer is not None
        loaders = super().val_dataloader()
        calibrates = self._learner is not None and self._learner.calibrates
        if loaders and self.trainer.state.fn == TrainerFn.FITTING and calibrates and self.prompt_plan.calibration:
            loaders.append(self.calibration_batches("calibration"))
        return loaders

    def state_dict(self) -> dict[str, Any]:
        """How far into the epoch training is; Lightning keeps it in its checkpoints.

        Lightning keeps the loader's own state too, but drops it where it resumes between epochs.
        """
        return self._train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; see `TrainLoader`."""
        self._train_loader.load_state_dict(state_dict, self.train_data.iterations)
