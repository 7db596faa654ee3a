"""Small output heads with random weights, and their logits in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from erpd_lightning.models.head import Head
from support import reference
from support.reference import grad

N, V, D = 7, 11, 5


# one token a chunk (also when not even one fits), 2 (rest 1), 3 (rest 1), 6 (rest 1), exactly all
CUTS = pytest.mark.parametrize("max_logits", [1, 11, 22, 35, 76, 77, 10**6])

HEADS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True},
        {"scale": 0.3},
        {"softcap": 2.0},
        {"bias": True, "scale": 2.5, "softcap": 4.0},
    ],
    ids=["plain", "bias", "scale", "softcap", "all"],
)

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def some_head(bias: bool = False, scale: float = 1.0, softcap: float | None = None) -> Head:
    return Head(
        weight=torch.randn(V, D, requires_grad=True),
        bias=torch.randn(V, requires_grad=True) if bias else None,
        scale=scale,
        softcap=softcap,
    )


def some_hidden(tokens: int = N) -> Tensor:
    return torch.randn(tokens, D, requires_grad=True)


def leaves(head: Head, hidden: Tensor) -> list[Tensor]:
    return [hidden, head.weight, *([] if head.bias is None else [head.bias])]


def in_float64(head: Head, hidden: Tensor) -> tuple[list[Tensor], Tensor]:
    """The same leaves in float64 and the log-probs of all the vocabulary at once."""
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves(head, hidden)]
    logits = exact[0] @ exact[1].T
    if head.bias is not None:
        logits = logits + exact[2]
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return exact, torch.log_softmax(logits, -1)


def reference_logits(head: Head, hidden: Tensor) -> np.ndarray:
    return reference.head_logits(hidden, head.weight, head.bias, head.scale, head.softcap)


def assert_same_gradients(result: Tensor, leaves: list[Tensor], expected: Tensor, exact: list[Tensor]) -> None:
    """Of a randomly weighted sum, so that no error cancels."""
    weights = torch.randn(result.shape)
    (result * weights).sum().backward()
    (expected * weights).sum().backward()
    for leaf, twin in zip(leaves, exact, strict=True):
        assert (grad(twin) != 0).any()
        torch.testing.assert_close(grad(leaf).double(), grad(twin), **CLOSE)


def as_logits(rows: list[list[float]]) -> tuple[Head, Tensor]:
    """A head and hidden states whose logits are the given numbers."""
    hidden = torch.tensor(rows, requires_grad=True)
    return Head(weight=torch.eye(hidden.shape[1], requires_grad=True)), hidden
