"""Evaluation on fresh samples: a module that validates and tests so, the sums over prompts, and the metrics of them."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from ..data.batching import RolloutBatch, RolloutTable
from ..data.loader import micro_batches
from ..data.prompt_batches import PromptBatch
from ..data.ranks import gathered
from ..data.reward_parts import read_parts
from ..data.samples import kept_rows, sample_table, write_samples
from ..errors import UserError, check_at_least
from ..metrics import ClusteredRatio, PassAtK, distinct_responses, majority_correct
from ..models.policy import Policy
from ..seeds import derive_seed
from .policy_module import PolicyModule

EVALUATIONS = ("val", "calibration", "test")
"""What is sampled afresh: held-out prompts, unused training prompts, and held-out prompts again."""

REWARDS = "rewards/"
"""In front of the names of the rewards that a reward is made of."""
NAMES = {"pass_at_1": "pass@1", "pass_at_k": "pass@k", "majority": "majority@k"}
"""What metrics are called in logs and summaries whose names no module may have."""

Collector = Callable[[str, RolloutBatch, Tensor], None]
"""Takes the name of a reference, some of the responses, whose `rows` are those of their table, and the KL to it at
each of their tokens, `(B, T)` in nats; what is outside the mask does not count."""


class EvaluationModule(PolicyModule):
    """A policy that is validated and tested on its own fresh responses to held-out prompts.

    A module of your own that subclasses it and adds a `training_step` has evaluation, references and export without
    our training.

    Args:
        policy: Folder or hub name of the causal language model.
        pass_at_k: The k of pass@k, or None for as many as there are samples of a prompt.
        **kwargs: Further arguments of `PolicyModule`.

    Raises:
        InvalidArgument: For a value out of range.
    """

    def __init__(self, policy: str | Path, pass_at_k: int | None = None, **kwargs: Any) -> None:
        super().__init__(policy, **kwargs)
        check_at_least(1, pass_at_k=pass_at_k)
        self.pass_at_k = pass_at_k
        self.metrics = nn.ModuleDict({stage: nn.ModuleDict() for stage in EVALUATIONS})

    def validation_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Sample, verify, and measure; see `evaluate`. A second loader's prompts are for calibration."""
        self.evaluate(batch, self.metrics[EVALUATIONS[dataloader_idx]])

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """The same as validation, under `test/`."""
        self.evaluate(batch, self.metrics["test"])

    @torch.no_grad()
    def evaluate(self, prompts: PromptBatch, metrics: Any) -> None:
        """Add the policy's own fresh responses to some prompts to the metrics.

        What is per token is the mean over all sampled tokens; standard errors count prompts, because
        responses to one prompt are alike. KL and entropy are exact over the vocabulary.
        """
        self._add_metrics(metrics, prompts)
        if not prompts.prompts:
            return
        table = prompts.respond(self.policy.model, derive_seed(prompts.seed, self.global_step))
        sums = answer_sums(table, prompts) if prompts.answers_only else self._prompt_sums(table, prompts)
        if "majority" in metrics:
            sums["majority"] = majority_sums(table, prompts)
        update_metrics(metrics, sums, prompts.samples)

    def on_validation_epoch_end(self) -> None:
        """Log and reset."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log and reset."""
        self._log_metrics("test")

    def on_validation_end(self) -> None:
        """Free the references: between evaluations one policy alone is in memory."""
        self.release_references()

    on_test_end = on_validation_end

    def _prompt_sums(self, table: pa.Table, prompts: PromptBatch) -> dict[str, Tensor]:
        """What the metrics take of responses to some prompts."""
        return prompt_sums(self.policy, self.reference, self.references, table, prompts)

    def _add_metrics(self, metrics: Any, prompts: PromptBatch) -> None:
        """Make the metrics when the first batch says how many samples there are."""
        if len(metrics):
            return
        samples = prompts.samples
        k = self.pass_at_k or samples
        if metrics is self.metrics["calibration"]:  # Nothing but its KL is asked for.
            k = min(k, samples)
        if k > samples:
            raise UserError(f"pass_at_k is {k}, but only {samples} responses are sampled to a prompt")
        add_metrics(metrics, k, None if prompts.answers_only else self.references, prompts.verifier.part_names)
        # Votes need all answers looked for once more, which is left to tests.
        is_test = metrics is self.metrics["test"]
        if is_test and prompts.verifier.final_answers([]) is not None:
            metrics["majority"] = ClusteredRatio()
        metrics.to(self.device)

    def _log_metrics(self, stage: str) -> None:
        metrics: Any = self.metrics[stage]
        shown = ("pass@1", "kl_per_token")
        for name, value in evaluated(metrics).items():
            # The value is the same on all ranks: sync_dist only says that it is meant to be.
            shown_here = stage == "val" and name in shown
            self.log(f"{stage}/{name}", value.float(), prog_bar=shown_here, sync_dist=True)
        for metric in metrics.values():
            metric.reset()


class EvaluationWithSamples(EvaluationModule):
    """Evaluation module that also stores its first responses, for the report; its weights are those of its folder.

    Args:
        policy: Folder or hub name of the causal language model.
        references: Policies that the KL is measured to, by name; `base` is one of them.
        samples_path: The file that a test writes: responses to the first prompts of all ranks, of the `SAMPLES` schema.
        **kwargs: Further arguments of `EvaluationModule`.
    """

    def __init__(self, policy: str | Path, references: Mapping[str, str], samples_path: Path, **kwargs: Any) -> None:
        super().__init__(policy, references=dict(references), **kwargs)
        self._samples_path = samples_path
        self._tables: list[pa.Table] = []

    def reference(self, name: str) -> Policy:
        """See `PolicyModule`; a policy that is its own reference is not loaded twice."""
        is_itself = str(self.reference_paths[name]) == str(self.policy_path)
        return self.policy if is_itself else super().reference(name)

    def on_test_epoch_start(self) -> None:
        """Nothing of an earlier test is kept."""
        self._tables = []

    def _prompt_sums(self, table: pa.Table, prompts: PromptBatch) -> dict[str, Tensor]:
        """Note the first responses on the way."""
        kls: dict[int, list[float]] = {}

        def note(name: str, part: RolloutBatch, kl: Tensor) -> None:
            if name == "base":
                for row, values, mask in zip(part.rows.tolist(), kl.cpu(), part.mask.cpu(), strict=True):
                    kls[row] = values[mask].tolist()

        sums = prompt_sums(self.policy, self.reference, self.references, table, prompts, note)
        kept = kept_rows(table)
        self._tables.append(sample_table(kept, [kls[row] for row in range(len(kept))], prompts.tokenizer))
        return sums

    def on_test_epoch_end(self) -> None:
        """Log and reset, and write what all ranks noted."""
        super().on_test_epoch_end()
        noted = gathered(self._tables)
        if self.trainer.is_global_zero:
            write_samples(self._samples_path, [table for tables in noted for table in tables])


def add_metrics(metrics: Any, k: int, references: Iterable[str] | None, rewards: Iterable[str] = ()) -> None:
    """Put what is measured into an empty `nn.ModuleDict`.

    Args:
        metrics: The dictionary.
        k: The k of pass@k.
        references: Names of the policies that the KL is measured to; None where neither KL nor entropy is.
        rewards: Names of the rewards that a reward is made of.
    """
    metrics["pass_at_k"] = PassAtK(k)
    ratios = ["pass_at_1", "mean_reward", "unchecked"]
    ratios += [] if references is None else ["entropy_per_token"]
    ratios += ["mean_length", "truncated", "distinct"]
    for name in references or ():
        ratios += [f"kl_per_token/{name}", f"kl_per_response/{name}"]
    ratios += [f"{REWARDS}{name}" for name in rewards]
    for name in ratios:
        metrics[name] = ClusteredRatio()


def update_metrics(metrics: Any, sums: dict[str, Tensor], samples: int) -> None:
    """Add some prompts to the metrics.

    Args:
        metrics: What `add_metrics` made; beside it, `majority` is that of `majority_sums`.
        sums: What `prompt_sums` found, or `answer_sums` where no KL is measured.
        samples: Responses to each prompt.
    """
    number = torch.full_like(sums["correct"], samples)
    ratios = {
        "pass_at_1": ("correct", number),
        "mean_reward": ("reward", number - sums["unchecked"]),
        "unchecked": ("unchecked", number),
        "entropy_per_token": ("entropy", sums["tokens"]),
        "mean_length": ("tokens", number),
        "truncated": ("truncated", number),
        "distinct": ("distinct", number),
        "majority": ("majority", torch.ones_like(number)),
    }
    for key, metric in metrics.items():
        if key == "pass_at_k":
            metric.update(sums["correct"].long(), number.long())
        elif key.startswith(REWARDS):
            metric.update(sums[key], sums[f"checked {key}"])
        else:
            kind, _, reference = key.partition("/")
            name, divisor = ratios.get(kind, (reference, sums["tokens"] if kind == "kl_per_token" else number))
            metric.update(sums[name], divisor)


def prompt_sums(
    policy: Policy,
    reference: Callable[[str], Policy],
    names: Iterable[str],
    table: pa.Table,
    prompts: PromptBatch,
    collect: Collector | None = None,
) -> dict[str, Tensor]:
    """Sums over each prompt's responses, `(prompts,)` each.

    `correct`, `unchecked`, `truncated` and `distinct` count responses. `reward` is of those that could be checked:
    what could not is never correct, and has no reward. `rewards/NAME` is the same of a reward that it is made of, and
    `checked rewards/NAME` counts those that could be checked. KL and entropy are exact over the vocabulary, in nats.

    Args:
        policy: The policy that responded.
        reference: The policies that its KL is measured to, by name.
        names: Their names, which are the keys of their KL.
        table: The responses, of the `ROLLOUTS` schema.
        prompts: What they respond to.
        collect: Takes the KL of the tokens; None where their sums are enough.
    """
    rollouts, first = RolloutTable.from_arrow(table), prompts.groups[0]
    device = policy.head.weight.device
    sums = answer_sums(table, prompts)
    for name in ("entropy", *names):
        sums[name] = torch.zeros(len(prompts.prompts), dtype=torch.float64)
    for batch in micro_batches(rollouts, prompts.max_tokens):
        group = rollouts.groups[batch.rows] - first
        batch = batch.to(device)
        hidden = policy.hidden(batch)
        entropy = policy.token_logps(batch, hidden).entropy
        sums["entropy"].index_add_(0, group, entropy.sum(-1).double().cpu())
        for name in names:
            kl = policy.divergence(reference(name), batch, hidden).kl
            sums[name].index_add_(0, group, kl.sum(-1).double().cpu())
            if collect is not None:
                collect(name, batch, kl)
    return sums


def answer_sums(table: pa.Table, prompts: PromptBatch) -> dict[str, Tensor]:
    """What `prompt_sums` says without asking any policy: all but KL and entropy."""
    rollouts = RolloutTable.from_arrow(table)
    groups = rollouts.groups - prompts.groups[0]
    reasons = table["finish_reason"].to_numpy(zero_copy_only=False)
    checked = _checked(table)
    of_responses = {
        "correct": _correct(table, prompts),
        "reward": rollouts.rewards.double().where(checked, 0.0),
        "unchecked": ~checked,
        "truncated": torch.tensor(reasons == "length"),
        "tokens": torch.tensor(pc.list_value_length(table["response_ids"]).to_numpy()),
    }
    for name, rewards in read_parts(table).items():
        of_responses[f"{REWARDS}{name}"] = torch.tensor([reward or 0.0 for reward in rewards], dtype=torch.float64)
        of_responses[f"checked {REWARDS}{name}"] = torch.tensor([reward is not None for reward in rewards])
    sums = {
        name: torch.zeros(len(prompts.prompts), dtype=torch.float64).index_add_(0, groups, values.double())
        for name, values in of_responses.items()
    }
    sums["distinct"] = distinct_responses(table["response"].to_pylist(), groups)
    return sums


def majority_sums(table: pa.Table, prompts: PromptBatch) -> Tensor:
    """Whether the answer that most responses to a prompt give is correct, `(prompts,)`; see `majority_correct`.

    Args:
        table: The responses, of the `ROLLOUTS` schema.
        prompts: What they respond to, with a verifier that finds answers.
    """
    answers = prompts.final_answers(table)
    assert answers is not None
    return majority_correct(answers, _correct(table, prompts), RolloutTable.from_arrow(table).groups)


def _checked(table: pa.Table) -> Tensor:
    return torch.tensor(table["checked"].to_numpy(zero_copy_only=False))


def _correct(table: pa.Table, prompts: PromptBatch) -> Tensor:
    return _checked(table) & (torch.tensor(table["reward"].to_numpy()) >= prompts.correct_threshold)


def evaluated(metrics: Any) -> dict[str, Tensor]:
    """The values of evaluation metrics under the names that logs and summaries use.

    KL to the reference `base` is plain `kl_per_token`, to others `kl_per_token_to_NAME`.
    """
    found: dict[str, Tensor] = {}
    for name, metric in metrics.items():
        ratio = metric.compute()
        if name.startswith(REWARDS):
            found[name] = ratio.value
            continue
        name = NAMES.get(name, name).removesuffix("/base").replace("/", "_to_")
        found[name] = ratio.value
        if name.startswith(("pass@", "majority@", "kl_per_")):
            found[f"{name}_stderr"] = ratio.stderr
    return found
