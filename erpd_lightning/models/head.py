"""Bounded-memory use of a policy's output head: the logits of a batch never live all at once.

Every function works through its N tokens in chunks of at most `max_logits` logits (at least one
token). With autograd on, the chunks are recomputed in the backward pass; a single chunk is kept.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..objectives.divergences import Direction, entropy, exact_kl
from ..objectives.tilted_policy import LOG_ZERO

# 128 MiB in float32; a handful of such tensors live at a time.
MAX_LOGITS = 2**25

MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What configurations of `transformers` call a factor of the logits, what divides them, and the bound on them."""

MULTIPLIED_BY_DIVISORS = ("hyperclovax", "hyperclovax_vision_v2")
"""Model types that multiply by what others divide by."""

UNSCALED = ("mpt",)
"""Model types whose configuration has a factor that the model never uses."""


class TokenStats(NamedTuple):
    """Per token, `(N,)` each, in nats: log-prob of the target, and entropy (detached)."""

    logps: Tensor
    entropy: Tensor


class Divergence(NamedTuple):
    """Per token, `(N,)` each, in nats: KL of p and q, and entropy of p (detached)."""

    kl: Tensor
    entropy: Tensor


@dataclass
class Head:
    """An output head: what turns hidden states into logits.

    Args:
        weight: `(V, D)`.
        bias: `(V,)`, or None.
        scale: Factor of the logits.
        softcap: Bound on the scaled logits, by `softcap * tanh(logits / softcap)`; None for none.
        temperature: What the logits are divided by in the end: the policy is the one that samples at it.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @classmethod
    def of(cls, model: Any) -> "Head":
        """The head of a transformers causal language model; it shares the model's parameters.

        Reads what it does to the logits from the model's configuration, where that has any of `MULTIPLIERS`,
        `DIVISORS` and `SOFTCAPS`. Whether that is all the model does to them, `checks.check_policy` finds out.
        """
        layer, config = model.get_output_embeddings(), model.config.get_text_config()
        softcaps = (getattr(config, name, None) for name in SOFTCAPS)
        return cls(
            weight=layer.weight,
            bias=getattr(layer, "bias", None),
            scale=_scale(config),
            softcap=next((value for value in softcaps if value), None),
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """`(N, D)` hidden states to `(N, V)` logits, in float32 (float64 for a head in float64)."""
        logits = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.temperature == 1 else logits / self.temperature

    def logps(self, hidden: Tensor) -> Tensor:
        """`(N, D)` hidden states to `(N, V)` log-probs, in nats."""
        return self.logits(hidden).log_softmax(-1)


def _scale(config: Any) -> float:
    """The factor of the logits that a configuration asks for."""
    kind = getattr(config, "model_type", "")
    if kind in UNSCALED:
        return 1.0
    multiplier = math.prod(getattr(config, name, None) or 1.0 for name in MULTIPLIERS)
    divisor = math.prod(getattr(config, name, None) or 1.0 for name in DIVISORS)
    return multiplier * divisor if kind in MULTIPLIED_BY_DIVISORS else multiplier / divisor


def token_logps(head: Head, hidden: Tensor, targets: Tensor, *, max_logits: int = MAX_LOGITS) -> TokenStats:
    """Log-probs of the targets, differentiable, and entropies, detached.

    Args:
        head: Head of the policy.
        hidden: `(N, D)` hidden states that predict the targets.
        targets: `(N,)` long token ids.
        max_logits: Logits that may live at a time.
    """

    def stats(hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        logp = head.logps(hidden)
        return logp.gather(1, targets[:, None])[:, 0], entropy(logp.detach())

    return TokenStats(*_chunked(stats, head, max_logits, hidden, targets))


@torch.no_grad()
def select_support(
    head: Head,
    hidden: Tensor,
    *,
    mass: float = 0.999,
    max_size: int = 64,
    max_logits: int = MAX_LOGITS,
) -> Tensor:
    """The fewest top entries that hold a probability mass: long ids `(N, K)`, padded with -1.

    K is the largest size that any token uses, and at least 1.

    Args:
        head: Head of the policy.
        hidden: `(N, D)` hidden states.
        mass: Cumulative probability from which on no more entries are kept, in (0, 1].
        max_size: Most entries that are kept for a token, even if they hold less.
        max_logits: Logits that may live at a time.

    Raises:
        ValueError: for a mass or a size out of range.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"the support's mass is {mass}; it has to be in (0, 1]")
    if max_size < 1:
        raise ValueError(f"the support's max_size is {max_size}; it has to be at least 1")

    def top(hidden: Tensor) -> tuple[Tensor, ...]:
        logp, ids = head.logps(hidden).topk(min(max_size, len(head.weight)))
        held = logp.exp().cumsum(-1)
        # An entry is kept when those before it hold too little; the first one always is.
        full = F.pad(held[:, :-1], (1, 0)) >= mass
        return (ids.masked_fill(full, -1),)

    (ids,) = _chunked(top, head, max_logits, hidden)
    size = int((ids >= 0).any(0).sum())
    return ids[:, : max(1, size)]


def support_logps(head: Head, hidden: Tensor, ids: Tensor, *, max_logits: int = MAX_LOGITS) -> Tensor:
    """Log-probs of a support and of the tail bucket, in nats: `(N, K+1)`, differentiable.

    Padding holds `LOG_ZERO`. The last slot is the log of the mass outside the support, a logsumexp
    over the complement (exact where 1 - sum is not), at least `LOG_ZERO`.

    Args:
        head: Head of the policy.
        hidden: `(N, D)` hidden states.
        ids: `(N, K)` long vocabulary entries, distinct in each row, padded with -1.
        max_logits: Logits that may live at a time.
    """

    def logps(hidden: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        logp, pad = head.logps(hidden), ids < 0
        kept = logp.gather(1, ids.clamp(min=0)).masked_fill(pad, LOG_ZERO)
        rows, vocabulary = logp.shape
        # One column more than the vocabulary, which takes the padding.
        inside = torch.zeros(rows, vocabulary + 1, dtype=torch.bool, device=logp.device)
        inside = inside.scatter(1, ids.masked_fill(pad, vocabulary), True)[:, :vocabulary]
        # A finite lowest value: the logsumexp of an empty complement has NaN gradients with -inf.
        outside = logp.masked_fill(inside, torch.finfo(logp.dtype).min)
        tail = outside.logsumexp(-1, keepdim=True).clamp(min=LOG_ZERO)
        return (torch.cat([kept, tail], dim=-1),)

    return _chunked(logps, head, max_logits, hidden, ids)[0]


def divergence(
    head_p: Head,
    hidden_p: Tensor,
    head_q: Head,
    hidden_q: Tensor,
    *,
    direction: Direction = "reverse",
    max_logits: int = MAX_LOGITS,
) -> Divergence:
    """`KL(p || q)`, or `KL(q || p)`, exactly over the vocabulary, and the entropy of p (detached).

    Gradients reach p alone, in either direction.

    Args:
        head_p: Head of policy p.
        hidden_p: `(N, D_p)` hidden states of policy p.
        head_q: Head of policy q, over the same vocabulary.
        hidden_q: `(N, D_q)` hidden states of policy q, for the same tokens.
        direction: `reverse` for `KL(p || q)`, `forward` for `KL(q || p)`.
        max_logits: Logits of each policy that may live at a time.
    """

    def measure(hidden_p: Tensor, hidden_q: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            logq = head_q.logps(hidden_q)
        logp = head_p.logps(hidden_p)
        kl = exact_kl(logp, logq) if direction == "reverse" else exact_kl(logq, logp)
        return kl, entropy(logp.detach())

    return Divergence(*_chunked(measure, head_p, max_logits, hidden_p, hidden_q))


def _chunked(
    function: Callable[..., tuple[Tensor, ...]], head: Head, max_logits: int, *inputs: Tensor
) -> tuple[Tensor, ...]:
    """`function(*inputs)`, computed on chunks of the inputs' rows and concatenated."""
    size = max(1, max_logits // len(head.weight))
    if len(inputs[0]) <= size:
        return function(*inputs)
    if torch.is_grad_enabled():
        # Nothing here is random, so there is no generator state to bring back.
        function = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    chunks = zip(*(torch.split(rows, size) for rows in inputs), strict=True)
    outputs = [function(*chunk) for chunk in chunks]
    return tuple(torch.cat(pieces) for pieces in zip(*outputs, strict=True))
