"""What is measured of a policy on its own fresh responses: sums over prompts, and the metrics that take them."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from ..data.batching import RolloutBatch, RolloutTable
from ..data.loader import micro_batches
from ..data.prompts import PromptBatch
from ..metrics import ClusteredRatio, PassAtK, distinct_responses
from ..models.policy import Policy

Collector = Callable[[str, RolloutBatch, Tensor], None]
"""Takes the name of a reference, some of the responses, whose `rows` are those of their table, and the KL to it at
each of their tokens, `(B, T)` in nats; what is outside the mask does not count."""


def add_metrics(metrics: Any, k: int, references: Iterable[str]) -> None:
    """Put what is measured into an empty `nn.ModuleDict`.

    Args:
        metrics: The dictionary.
        k: The k of pass@k.
        references: Names of the policies that the KL is measured to.
    """
    metrics["pass_at_k"] = PassAtK(k)
    ratios = ["pass_at_1", "entropy_per_token", "mean_length", "truncated", "distinct"]
    for name in references:
        ratios += [f"kl_per_token/{name}", f"kl_per_response/{name}"]
    for name in ratios:
        metrics[name] = ClusteredRatio()


def update_metrics(metrics: Any, sums: dict[str, Tensor], samples: int, references: Iterable[str]) -> None:
    """Add some prompts to the metrics.

    Args:
        metrics: What `add_metrics` made.
        sums: What `prompt_sums` found.
        samples: Responses to each prompt.
        references: Names of the policies that the KL is measured to.
    """
    number = torch.full_like(sums["correct"], samples)
    metrics["pass_at_1"].update(sums["correct"], number)
    metrics["pass_at_k"].update(sums["correct"].long(), number.long())
    metrics["entropy_per_token"].update(sums["entropy"], sums["tokens"])
    metrics["mean_length"].update(sums["tokens"], number)
    metrics["truncated"].update(sums["truncated"], number)
    metrics["distinct"].update(sums["distinct"], number)
    for name in references:
        metrics[f"kl_per_token/{name}"].update(sums[name], sums["tokens"])
        metrics[f"kl_per_response/{name}"].update(sums[name], number)


def prompt_sums(
    policy: Policy,
    reference: Callable[[str], Policy],
    names: Iterable[str],
    table: pa.Table,
    prompts: PromptBatch,
    collect: Collector | None = None,
) -> dict[str, Tensor]:
    """Sums over each prompt's responses, `(prompts,)` each, of KL, entropy, tokens, right, cut-off and different ones.

    KL and entropy are exact over the vocabulary, in nats.

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
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(len(prompts.prompts), dtype=torch.float64))
    reasons = table["finish_reason"].to_numpy(zero_copy_only=False)
    truncated = torch.tensor(reasons == "length").double()
    sums["correct"].index_add_(0, rollouts.groups - first, rollouts.rewards.double())
    sums["truncated"].index_add_(0, rollouts.groups - first, truncated)
    sums["distinct"] = distinct_responses(table["response"].to_pylist(), rollouts.groups)
    for batch in micro_batches(rollouts, prompts.max_tokens):
        group = rollouts.groups[batch.rows] - first
        sums["tokens"].index_add_(0, group, batch.mask.sum(-1).double())
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


def evaluated(metrics: Any) -> dict[str, Tensor]:
    """The values of evaluation metrics under the names that logs and summaries use.

    KL to the reference `base` is plain `kl_per_token`, to others `kl_per_token_to_NAME`.
    """
    found: dict[str, Tensor] = {}
    for name, metric in metrics.items():
        if isinstance(metric, PassAtK):
            found["pass@k"] = metric.compute()
            continue
        ratio = metric.compute()
        name = name.replace("pass_at_1", "pass@1").removesuffix("/base").replace("/", "_to_")
        found[name] = ratio.value
        if name.startswith(("pass@1", "kl_per_")):
            found[f"{name}_stderr"] = ratio.stderr
    return found
