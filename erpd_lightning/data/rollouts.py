"""`RolloutDataModule`: rollouts sampled once, kept in a store, and read again in every epoch."""

import copy
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from ..errors import InvalidArgument, UserError
from ..files import sha256_file
from ..models.loading import context_length, load_tokenizer
from ..objectives.advantages import group_advantages
from ..seeds import derive_seed
from .batching import RolloutBatch, RolloutTable, ScoreTable
from .loader import StepLoader, pieces_needed
from .predict_data import Parts, SamplingPass, ScoringPass, ranks, run_pass
from .prompts import Prompt, PromptBatch, read_prompts, tokenize
from .samplers import Sampler, TransformersSampler
from .store import Store, joined
from .verifiers import ExactMatch, Unverified, Verifier


class RolloutDataModule(LightningDataModule):
    """Samples responses, verifies them, and serves the stored rollouts in batches.

    Training reads the store alone. Where it does not exist yet, `fit` first samples it from the policy that is
    about to be trained; `sampling()` does only that, in a `Trainer.predict`. Validation and testing sample
    afresh from held-out prompts.

    With several `iterations`, training is on-policy: the round's prompts are cut into as many parts, and each part
    is answered by the policy as it is when its turn comes, into a store of its own. The trainer's `max_epochs` are
    shared out evenly, so that `max_epochs / iterations` epochs are trained on each part.

    A training batch is a micro-batch of an optimiser step of `batch_size` responses over all ranks. How many
    micro-batches that takes follows from `max_tokens`, and the trainer's `accumulate_grad_batches` is raised to
    it; it never changes the gradient.

    Args:
        store: Directory of the rollout store.
        tokenizer: Folder or hub name of the tokenizer: that of the base policy.
        prompts: JSONL file or data set of prompts to sample from, with `prompt` and `answer`; not needed where
            the store is complete.
        validation_prompts: Held-out prompts in the same format; None for no validation.
        scores: Directory with the stored scores of policies on the rollouts, for distillation.
        earlier: Rollout stores of the rounds before, the latest first.
        replay: How many of them are trained on again beside the round's own, each response with the log-probs of the
            policy that sampled it; 0 for none. They cost no sampling and no verification. What the scores are of, and
            hence what is distilled, is the round's own rollouts alone: the states that its base policy comes to.
        fresh: Directory for the rollouts of a student that answers the prompts itself while it is distilled
            (`distill.iterations`); they are not verified.
        sampler: Draws the responses.
        verifier: Checks the responses against the answers.
        group_size: Responses to each prompt.
        baseline: What the reward of a response is compared with to give its advantage: the rewards of its `group`, as
            in GRPO, or those of its `batch`, as in REINFORCE++: of all rollouts of its round, or of its iteration. In
            a group of wrong responses alone there is nothing to learn by comparison; beside the batch they are wrong.
        prompts_per_round: Prompts to sample from in a round; None for all of them. Each round takes the next ones.
        round: The round, from 1, that says which prompts are next.
        preview_prompts: The last of the round's prompts, on which signals are previewed: no rollouts are sampled
            from them.
        iterations: Parts of the round's prompts, each answered by the policy as it is when its turn comes; 1 for
            fixed rollouts of the starting policy alone.
        batch_size: Responses per optimiser step, over all ranks and micro-batches.
        max_tokens: Padded tokens of a micro-batch, the bound on the memory that it takes.
        validation_samples: Fresh responses to each held-out prompt.
        max_validation_prompts: Held-out prompts that are used, the first ones; None for all of them.
        calibration_prompts: Training prompts outside the round on which a student's KL is measured while it is
            distilled, as many of them as there are; 0 for none. They are sampled, not verified rollouts.
        calibration_samples: Fresh responses to each of them.
        seed: Seed of sampling and shuffling.

    Raises:
        UserError: For a value out of range.
    """

    def __init__(
        self,
        store: str | Path,
        tokenizer: str | Path,
        prompts: str | Path | None = None,
        validation_prompts: str | Path | None = None,
        scores: str | Path | None = None,
        earlier: Sequence[str | Path] = (),
        replay: int = 0,
        fresh: str | Path | None = None,
        sampler: Sampler | None = None,
        verifier: Verifier | None = None,
        group_size: int = 16,
        baseline: Literal["group", "batch"] = "group",
        prompts_per_round: int | None = None,
        round: int = 1,
        preview_prompts: int = 0,
        iterations: int = 1,
        batch_size: int = 256,
        max_tokens: int = 16384,
        validation_samples: int = 8,
        max_validation_prompts: int | None = None,
        calibration_prompts: int = 512,
        calibration_samples: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        counts = {
            "group_size": group_size,
            "prompts_per_round": prompts_per_round,
            "round": round,
            "iterations": iterations,
            "batch_size": batch_size,
            "max_tokens": max_tokens,
            "validation_samples": validation_samples,
            "max_validation_prompts": max_validation_prompts,
            "calibration_samples": calibration_samples,
        }
        for name, count in counts.items():
            if count is not None and count < 1:
                raise InvalidArgument(name, f"is {count}: it must be at least 1")
        optional = {
            "calibration_prompts": calibration_prompts,
            "preview_prompts": preview_prompts,
            "replay": replay,
        }
        for name, count in optional.items():
            if count < 0:
                raise InvalidArgument(name, f"is {count}: it must be at least 0")
        if baseline not in ("group", "batch"):
            raise InvalidArgument("baseline", f"is {baseline!r}: it must be 'group' or 'batch'")
        if replay and iterations > 1:
            raise InvalidArgument(
                "replay",
                f"is {replay}, but iterations ({iterations}) is above 1: what is trained on-policy takes no earlier "
                "rollouts",
            )
        self.root = Path(store)
        self.tokenizer_path = tokenizer
        self.prompts = prompts
        self.validation_prompts = validation_prompts
        self.scores = None if scores is None else Path(scores)
        self.earlier = [Path(path) for path in earlier]
        self.replay = replay
        self.fresh = None if fresh is None else Path(fresh)
        self.sampler = sampler or TransformersSampler()
        self.verifier = verifier or ExactMatch()
        self.group_size = group_size
        self.baseline = baseline
        self.prompts_per_round = prompts_per_round
        self.round = round
        self.preview_prompts = preview_prompts
        self.iterations = iterations
        self.iteration = 1
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.validation_samples = validation_samples
        self.max_validation_prompts = max_validation_prompts
        self.calibration_prompts = calibration_prompts
        self.calibration_samples = calibration_samples
        self.seed = seed
        self._loader: StepLoader | None = None
        self._resumed: dict[str, int] | None = None
        self._least_pieces = 1
        self._student: RolloutDataModule | None = None
        self._is_student = False

    @property
    def trained(self) -> "RolloutDataModule":
        """What serves the rollouts that are trained on: itself, or those of a student that answers prompts itself."""
        module: Any = None if self.trainer is None else self.trainer.lightning_module
        if module is None or module.iterations == 1 or self._is_student:
            return self
        if self._student is None or self._student.iterations != module.iterations:
            self._student = self._of_student(module.iterations)
        self._student.trainer = self.trainer
        return self._student

    def _of_student(self, iterations: int) -> "RolloutDataModule":
        """The same prompts in so many parts, their answers in `fresh`, without rewards.

        Raises:
            UserError: If there is no place for them.
        """
        if self.fresh is None:
            raise UserError(
                f"distill.iterations is {iterations}: RolloutDataModule(fresh=…) has to say where the student's "
                "rollouts are to be kept"
            )
        student = copy.copy(self)
        student.forget()
        student.root, student.scores, student.verifier = self.fresh, None, Unverified()
        student.iterations, student.iteration, student._is_student = iterations, 1, True
        student.earlier = []
        student._loader = student._resumed = None
        return student

    @property
    def store(self) -> Path:
        """Where the rollouts lie; those of the iteration where there are several."""
        return self.stores()[self.iteration - 1]

    def stores(self) -> list[Path]:
        """Where the rollouts of all iterations lie."""
        if self.iterations == 1:
            return [self.root]
        return [self.root / f"iteration-{number:04}" for number in range(1, self.iterations + 1)]

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the policies."""
        return load_tokenizer(self.tokenizer_path)

    @property
    def trained_on(self) -> list[Path]:
        """The stores whose rollouts are trained on: the round's own first."""
        return [self.store, *(self.earlier[: self.replay] if self.scores is None else [])]

    @cached_property
    def rollouts(self) -> RolloutTable:
        """The rollouts that are trained on, with the scores of policies where there are any."""
        stores = [Store.open(path) for path in self.trained_on]
        scores = {} if self.scores is None else self._read_scores(stores[0].fingerprint)
        return RolloutTable.from_arrow(joined(stores), scores)

    @cached_property
    def checked(self) -> Tensor:
        """`(N,)` bool, whether the answer could be checked."""
        tables = [Store.open(path, verify=False).table() for path in self.trained_on]
        return torch.tensor(np.concatenate([table["checked"].to_numpy() for table in tables]))

    @cached_property
    def advantages(self) -> Tensor:
        """`(N,)` advantages over the baseline; 0 for what could not be checked, which the baseline leaves out."""
        compared = self.rollouts.groups if self.baseline == "group" else self._batches
        advantages = torch.zeros(len(self.checked))
        advantages[self.checked] = group_advantages(self.rollouts.rewards[self.checked], compared[self.checked])
        return advantages

    @property
    def _batches(self) -> Tensor:
        """`(N,)` long, which of the stores a response is from."""
        sizes = torch.tensor([Store.open(path, verify=False).rows for path in self.trained_on])
        return torch.arange(len(sizes)).repeat_interleave(sizes)

    def check_groups(self, module: Any, objective: str = "the objective") -> None:
        """Whether the objective of the module has something to compare a response with.

        Raises:
            UserError: If a group is all that it is compared with, and consists of it alone.
        """
        if module.needs_groups and self.baseline == "group" and self.group_size < 2:
            raise UserError(
                f"data.group_size is {self.group_size}: {objective} compares the responses of a group, which takes at "
                "least 2 (or data.baseline: batch)"
            )

    def forget(self) -> None:
        """Read the stores again when they are next needed: one of them has changed."""
        for name in ("rollouts", "checked", "advantages"):
            self.__dict__.pop(name, None)

    def sampling(self) -> SamplingPass:
        """A data module for `Trainer.predict` that samples and verifies this round's rollouts."""
        return SamplingPass(self)

    def scoring(self, name: str) -> ScoringPass:
        """A data module for `Trainer.predict` that stores what the policy called `name` says of the rollouts.

        `base` comes first: its support is everyone's.
        """
        return ScoringPass(self, name)

    def train_dataloader(self) -> StepLoader:
        """The rollouts that enter the module's loss, shuffled anew in each epoch.

        Raises:
            UserError: If none does, or a group is needed and there is none.
        """
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        if self.trained is not self:
            return self.trained.train_dataloader()
        if self.iterations > 1:
            self._iterate(self.trainer)
        if not Store.exists(self.store):
            self.check_groups(module)
            run_pass(self.sampling(), self.trainer)
        rollouts = self.rollouts
        # Neither right nor wrong: a flipped reward must not turn what could not be checked into either.
        rewards = rollouts.rewards.where(self.checked, torch.nan)
        rows = module.select(rewards, self.advantages).nonzero()[:, 0]
        if len(rows) == 0 and self.iterations > 1:
            rows = torch.zeros(1, dtype=torch.long)  # A step that teaches nothing: the next part may.
        if len(rows) == 0:
            right = float((rollouts.rewards == 1).float().mean())
            raise UserError(
                f"{self.store}: no response enters the loss, no {self.baseline} has both right and wrong answers "
                f"({right:.0%} of {len(rollouts.rewards)} are right); "
                "sample other prompts, or more responses to each (data.group_size)"
            )
        rank, world_size = ranks(self.trainer)
        lengths = rollouts.lengths
        needed = pieces_needed(lengths[rows], self.batch_size, self.max_tokens)
        pieces = max(-(-needed // world_size), self.trainer.accumulate_grad_batches, self._least_pieces)
        self.trainer.accumulate_grad_batches = pieces
        self._loader = StepLoader(
            partial(rollouts.batch, advantages=self.advantages),
            lengths,
            rollouts.response_lengths,
            rows,
            batch_size=self.batch_size,
            pieces_per_rank=pieces,
            rank=rank,
            world_size=world_size,
            seed=derive_seed(self.seed, "shuffle"),
            shuffle=True,
        )
        self._go_on()
        return self._loader

    def _iterate(self, trainer: Any) -> None:
        """Go to the iteration of the trainer's epoch, and be asked for a loader in each epoch.

        Raises:
            UserError: If the epochs cannot be shared out evenly.
        """
        if trainer.max_epochs < 1 or (trainer.max_epochs % self.iterations and not trainer.fast_dev_run):
            key = "distill.iterations" if self._is_student else "data.iterations"
            raise UserError(
                f"max_epochs is {trainer.max_epochs}: it must be a multiple of {key} ({self.iterations}), each of "
                "which is trained on for as many epochs"
            )
        trainer.reload_dataloaders_every_n_epochs = 1
        iteration = 1 + trainer.current_epoch // self._epochs_of_iteration
        if iteration != self.iteration:
            self.iteration = iteration
            self.forget()

    @property
    def _epochs_of_iteration(self) -> int:
        assert self.trainer is not None
        return 1 if self.iterations == 1 else max(1, (self.trainer.max_epochs or 1) // self.iterations)

    def begins_iteration(self) -> bool:
        """Whether the trainer is in the first epoch of an iteration; of fixed rollouts each epoch is one."""
        assert self.trainer is not None
        return self.trainer.current_epoch % self._epochs_of_iteration == 0

    def sweep(self) -> Iterator[RolloutBatch]:
        """This rank's share of what the trainer trains on, once, in as many micro-batches on every rank."""
        assert self._loader is not None
        return self._loader.sweep()

    def state_dict(self) -> dict[str, Any]:
        """How far into the epoch training is; Lightning keeps it in its checkpoints.

        Lightning would keep the loader's own state too, but it restores that only if nothing has asked for the
        loader before, and the learning rate's schedule does.
        """
        if self.trained is not self:
            return self.trained.state_dict()
        loader = self._loader
        if loader is None:
            return {}
        return {**loader.state_dict(), "pieces": loader.pieces_per_rank, "iteration": self.iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        if self.trained is not self:
            self.trained.load_state_dict(state_dict)
            return
        self._resumed = state_dict
        if self.iterations > 1 and state_dict:
            # The parts before may have needed more micro-batches than those that are read again.
            self._least_pieces = state_dict["pieces"]
        self._go_on()

    def _go_on(self) -> None:
        """Put the loader where the checkpoint was saved, once both are there.

        Raises:
            UserError: If steps were cut into another number of micro-batches then.
        """
        if self._loader is None or self._resumed is None or self._resumed["iteration"] != self.iteration:
            return
        state, self._resumed = self._resumed, None
        if state["pieces"] != self._loader.pieces_per_rank:
            raise UserError(
                f"the checkpoint was saved with {state['pieces']} micro-batches of a process in a step, there are "
                f"{self._loader.pieces_per_rank} now: go on with the same data.max_tokens, accumulate_grad_batches "
                "and number of processes, or delete the stage's checkpoints"
            )
        self._loader.load_state_dict(state)

    def val_dataloader(self) -> list[Parts]:
        """This rank's held-out prompts and, where a student is calibrated on them, unused training prompts."""
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        loaders = self.test_dataloader()
        if loaders and self.trainer.state.fn == TrainerFn.FITTING and module.calibrates and self.calibration():
            loaders.append(self.calibration_batches("calibration"))
        return loaders

    def test_dataloader(self) -> list[Parts]:
        """This rank's held-out prompts; no loader at all where there are none."""
        prompts = self.held_out_prompts()
        return [self._prompt_loader(prompts, self.validation_samples, "validation")] if prompts else []

    predict_dataloader = test_dataloader

    def calibration(self) -> list[Prompt]:
        """The training prompts outside the round on which a student's KL is measured; none where all are in it."""
        return self.unused_prompts()[: self.calibration_prompts]

    def calibration_batches(self, purpose: str) -> Parts:
        """This rank's calibration prompts, to be answered with draws of their own for each purpose."""
        return self._prompt_loader(self.calibration(), self.calibration_samples, purpose)

    def _prompt_loader(self, prompts: list[Prompt], samples: int, purpose: str) -> Parts:
        assert self.trainer is not None
        return Parts(self.prompt_batches(prompts, samples, purpose, *ranks(self.trainer)))

    def held_out_prompts(self) -> list[Prompt]:
        """The held-out prompts that are used; none where there is no file of them."""
        if self.validation_prompts is None:
            return []
        return read_prompts(self.validation_prompts)[: self.max_validation_prompts]

    def round_prompts(self) -> list[Prompt]:
        """The prompts of this round: the next `prompts_per_round`, from the start again after the last.

        Of these, the iteration's part; not those that are for previews.

        Raises:
            UserError: If there is no file of prompts, or previews take all that are in it.
        """
        prompts = read_prompts(self._prompt_source())
        indices = self._round_indices(len(prompts))
        if self.preview_prompts >= len(indices):
            raise UserError(
                f"distill.signal holds out {self.preview_prompts} prompts for previews, but a round has only "
                f"{len(indices)}: lower its prompts, or raise data.prompts_per_round"
            )
        indices = indices[: len(indices) - self.preview_prompts]
        first, last = ((self.iteration - k) * len(indices) // self.iterations for k in (1, 0))
        return [prompts[i] for i in indices[first:last]]

    def held_out_for_previews(self) -> list[Prompt]:
        """The prompts of this round that signals are previewed on."""
        prompts = read_prompts(self._prompt_source())
        indices = self._round_indices(len(prompts))
        return [prompts[i] for i in indices[len(indices) - self.preview_prompts :]]

    def unused_prompts(self) -> list[Prompt]:
        """The training prompts that this round does not sample from, the next ones first."""
        if self.prompts is None:
            return []
        prompts = read_prompts(self.prompts)
        used = self._round_indices(len(prompts))
        later = (i % len(prompts) for i in range(used[-1] + 1, used[-1] + 1 + len(prompts) - len(used)))
        return [prompts[i] for i in later]

    def _prompt_source(self) -> str | Path:
        if self.prompts is None:
            raise UserError(f"{self.store} holds no finished rollouts, and data.prompts names no file to sample from")
        return self.prompts

    def _round_indices(self, available: int) -> list[int]:
        count = self.prompts_per_round or available
        if count > available:
            raise UserError(f"data.prompts_per_round is {count}, but {self.prompts} holds {available} prompts")
        first = (self.round - 1) * count
        return [i % available for i in range(first, first + count)]

    def prompt_batches(
        self, prompts: list[Prompt], samples: int, purpose: str, rank: int, world_size: int
    ) -> Iterator[PromptBatch]:
        """Batches of about `sampler.batch_size` responses; what is in a batch depends on no rank.

        Raises:
            UserError: If a prompt and its response do not fit the policy's context.
        """
        ids = [tokenize(self.tokenizer, prompt.prompt) for prompt in prompts]
        self._check_context(ids, purpose)
        size = max(1, self.sampler.batch_size // samples)
        count = -(-len(prompts) // size)
        # A rank without prompts of its own still gets a batch, an empty one, to take part in the reductions.
        for index in range(rank, max(count, rank + 1), world_size):
            chosen = range(index * size, min((index + 1) * size, len(prompts)))
            yield PromptBatch(
                index=index,
                prompts=[prompts[i] for i in chosen],
                prompt_ids=[ids[i] for i in chosen],
                groups=chosen,
                samples=samples,
                seed=derive_seed(self.seed, purpose, index),
                max_tokens=self.max_tokens,
                tokenizer=self.tokenizer,
                sampler=self.sampler,
                verifier=self.verifier,
            )

    def sampling_settings(self) -> dict[str, Any]:
        """All that the rollouts depend on, apart from the policy."""
        source = self._prompt_source()
        return {
            "prompts": sha256_file(source) if Path(source).is_file() else str(source),
            "prompts_per_round": self.prompts_per_round,
            "round": self.round,
            "iteration": self.iteration,
            "iterations": self.iterations,
            "preview_prompts": self.preview_prompts,
            "group_size": self.group_size,
            "sampler": [type(self.sampler).__qualname__, vars(self.sampler)],
            "verifier": [type(self.verifier).__qualname__, repr(sorted(vars(self.verifier).items()))],
            "seed": self.seed,
        }

    def _read_scores(self, fingerprint: str) -> dict[str, ScoreTable]:
        assert self.scores is not None
        tables = {}
        for path in sorted(path for path in self.scores.glob("*") if Store.exists(path)):
            store = Store.open(path)
            if store.metadata["rollouts"] != fingerprint:
                raise UserError(f"{path} scores other rollouts than those in {self.store}")
            tables[path.name] = ScoreTable.from_arrow(store.table())
        return tables

    def _check_context(self, ids: list[list[int]], purpose: str) -> None:
        context = context_length(self.tokenizer_path)
        longest = max(len(prompt) for prompt in ids)
        if context is not None and longest + self.sampler.max_new_tokens > context:
            number = next(i for i, prompt in enumerate(ids) if len(prompt) == longest) + 1
            raise UserError(
                f"{purpose} prompt {number} has {longest} tokens: with data.sampler.max_new_tokens "
                f"({self.sampler.max_new_tokens}) that is more than the policy's context of {context}"
            )
