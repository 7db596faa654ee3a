"""Divergences that are exact over the last dimension, in nats."""

import torch
from torch import Tensor


def exact_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """`KL(p || q) = sum p (log p - log q)` over the last dimension: `(..., V)` to `(...)`, in nats.

    Entries with p = 0 contribute 0 to the value and to the gradient, whatever q is there. The
    result is infinite where q = 0 < p.
    """
    possible = logp.exp() > 0
    # Replaced before the product: 0 * inf is NaN, and stays NaN in the gradient of a later `where`.
    logp, logq = torch.where(possible, logp, 0.0), torch.where(possible, logq, 0.0)
    return torch.where(possible, logp.exp() * (logp - logq), 0.0).sum(-1)


def entropy(logp: Tensor) -> Tensor:
    """`-sum p log p` over the last dimension: `(..., V)` to `(...)`, in nats."""
    return -exact_kl(logp, torch.zeros_like(logp))
