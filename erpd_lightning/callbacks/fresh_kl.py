"""The KL of a policy in training to another one, measured on fresh samples."""

import math
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from ..budget.search import Measurement
from ..data.prompt_batches import PromptBatcher
from ..data.prompts import PromptSet, PromptSource, read_prompts, tokenize
from ..data.ranks import ranks
from ..data.rollouts import RolloutDataModule
from ..data.samplers import Sampler, TransformersSampler
from ..data.verifiers import Unverified
from ..errors import InvalidArgument, UserError
from ..metrics import clustered_ratio
from ..models.loading import context_length, load_tokenizer
from ..models.policy import Policy, load_reference
from ..modules.eval_mode import eval_mode
from ..modules.evaluation import prompt_sums
from ..modules.policy_module import PolicyModule

MAX_TOKENS = 16384
"""Padded tokens that are run through a policy at a time, where no data module says."""

MAX_CHUNKS = 16
"""The most times that `max_prompts` prompts are taken for one measurement."""


class FreshKL:
    """Measures the KL to a reference policy on responses drawn for it, exactly over the vocabulary, on all ranks.

    Args:
        reference: A name among the `references` of a `PolicyModule`, or a folder or hub name.
        per: Whether the KL is per response `token` or per `response`.
        prompts: File or data set of the prompts, or a `PromptSource`; None for those of the trainer's
            `RolloutDataModule`.
        tokenizer: Where the tokenizer for them is; None for beside the reference.
        sampler: Draws responses to them; None for that of the trainer's `RolloutDataModule`, or the default.
        max_prompts: Prompts that are taken at a time.
        samples: Responses to each.
        seed: Seed of the draws.
    """

    def __init__(
        self,
        reference: str,
        per: Literal["token", "response"],
        prompts: PromptSource | str | Path | None,
        tokenizer: str | Path | None,
        sampler: Sampler | None,
        max_prompts: int,
        samples: int,
        seed: int,
    ) -> None:
        self.reference = reference
        self.per = per
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.sampler = sampler
        self.max_prompts = max_prompts
        self.samples = samples
        self.seed = seed
        self._source: tuple[PromptBatcher, PromptSet] | None = None

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Whether there is a reference to measure the KL to, and prompts to measure it on.

        Raises:
            InvalidArgument: If one of them is missing.
        """
        self.check_reference(getattr(module, "references", {}))
        self._find_prompts(trainer)

    def check_reference(self, names: Collection[str]) -> None:
        """Whether the KL can be measured to the reference, among the named ones of a module.

        Raises:
            InvalidArgument: If it is none of them, and no policy of its own.
        """
        if self.reference not in names and not _is_policy(self.reference):
            raise InvalidArgument(
                "reference",
                f"is {self.reference!r}: it is neither a folder, nor a hub name, nor among the module's references "
                f"({', '.join(names) or 'none'})",
            )

    def logged(self, trainer: Trainer, module: LightningModule) -> Measurement | None:
        """What the validation of a `PolicyModule` logged of this very KL; None where it did not."""
        if isinstance(module, PolicyModule) and self.reference in module.references:
            name = f"val/kl_per_{self.per}" + ("" if self.reference == "base" else f"_to_{self.reference}")
            found = trainer.callback_metrics
            if name in found:
                return Measurement(float(found[name]), float(found[f"{name}_stderr"]))
        return None

    @torch.no_grad()
    def measure(self, trainer: Trainer, module: LightningModule, purpose: str, stderr: float = math.inf) -> Measurement:
        """The KL, with a standard error of at most `stderr` if 16 times `max_prompts` prompts can give it.

        Prompts that come again after the last one add samples, not prompts, which are what the standard error counts.

        Args:
            trainer: Knows ranks, precision and data.
            module: Has the policy.
            purpose: Draws are a function of the seed and of this.
            stderr: The standard error that is asked for, in nats.

        Raises:
            UserError: If there is nothing to sample from, or no policy that could.
        """
        policy = policy_of(module)
        batcher, prompts = self._find_prompts(trainer)
        sums = torch.zeros(2, len(prompts), dtype=torch.float64)  # KL, and what it is divided by, of each prompt
        with self._policy(module) as reference, eval_mode(trainer, module):
            for chunk in range(MAX_CHUNKS):
                first, count = chunk * self.max_prompts, min(self.max_prompts, len(prompts))
                chosen = torch.arange(first, first + count) % len(prompts)
                name = f"kl budget, {purpose}, {chunk}"
                asked = prompts.take(chosen.tolist())
                for batch in batcher.batches(asked, self.samples, name, *ranks(trainer)):
                    if batch.prompts:
                        table = batch.respond(policy.model)
                        found_sums = prompt_sums(policy, {"kl": reference}.__getitem__, ["kl"], table, batch)
                        number = torch.full_like(found_sums["tokens"], self.samples)
                        places = chosen[torch.tensor(batch.groups)]
                        sums[0].index_add_(0, places, found_sums["kl"])
                        sums[1].index_add_(0, places, found_sums["tokens"] if self.per == "token" else number)
                total = trainer.strategy.reduce(sums.clone().to(module.device), reduce_op="sum")
                ratio = clustered_ratio(*total[:, total[1] > 0])
                found = Measurement(float(ratio.value), float(ratio.stderr))
                if stderr == math.inf or found.stderr <= stderr or math.isnan(found.kl):
                    break
        return found

    def clear_cache(self) -> None:
        """Find the prompts again when they are next needed: another trainer may have others."""
        self._source = None

    def _find_prompts(self, trainer: Trainer) -> tuple[PromptBatcher, PromptSet]:
        """The prompts to measure on, and what makes batches of them.

        Raises:
            InvalidArgument: If there are none.
        """
        if self._source is None:
            data: Any = getattr(trainer, "datamodule", None)
            if self.prompts is not None:
                path = self.tokenizer or self._path(trainer.lightning_module)
                # At the temperature of the rollouts: a budget holds at one.
                sampler = data.sampler if isinstance(data, RolloutDataModule) else TransformersSampler()
                self._source = self._own_prompts(self.prompts, path, self.sampler or sampler)
            elif isinstance(data, RolloutDataModule):
                prompts = data.prompt_plan.unused or data.prompt_plan.held_out
                self._source = replace(data.batcher, verifier=Unverified()), prompts
            if self._source is None or not self._source[1]:
                raise InvalidArgument("prompts", "is missing: the KL is measured on fresh responses to some prompts")
        return self._source

    def _own_prompts(
        self, source: PromptSource | str | Path, path: str | Path, sampler: Sampler
    ) -> tuple[PromptBatcher, PromptSet]:
        """Prompts of a file or data set, with the tokenizer beside a policy."""
        tokenizer, sampler = load_tokenizer(path), sampler.in_process
        encode = partial(tokenize, tokenizer)
        prompts = PromptSet(read_prompts(source, encode, answered=False).prompts, encode)
        return PromptBatcher(tokenizer, sampler, Unverified(), MAX_TOKENS, context_length(path), self.seed), prompts

    def _path(self, module: LightningModule) -> str:
        references: Mapping[str, str] = getattr(module, "references", {})
        return references.get(self.reference, self.reference)

    def _policy(self, module: LightningModule) -> AbstractContextManager[Policy]:
        """The reference policy while it is measured: the module's own where it may have it in memory."""
        if isinstance(module, PolicyModule) and self.reference in module.references:
            return module.reference_context(self.reference)
        return nullcontext(load_reference(self._path(module), policy_of(module), "reference"))


def policy_of(module: LightningModule) -> Policy:
    """The module's policy, with the questions that are asked of it.

    Raises:
        UserError: If it has none.
    """
    policy = getattr(module, "policy", None)
    if not isinstance(policy, nn.Module):
        raise UserError(
            f"KLBudget needs a module with a policy, a causal language model: {type(module).__name__}.policy is "
            f"{type(policy).__name__}"
        )
    return policy if isinstance(policy, Policy) else Policy(policy)


def _is_policy(name: str) -> bool:
    """Whether a name can be that of a folder or of a model on the hub."""
    return Path(name).is_dir() or name.count("/") == 1
