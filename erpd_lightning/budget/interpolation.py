"""Interpolation between the weights of two policies: `base + alpha * (trained - base)`.

KL to the base policy grows along it, near the base with the square of alpha. Interpolated weights: arXiv 2109.01903,
and towards the initial policy of reinforcement learning arXiv 2406.16768.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


class WeightInterpolation:
    """The weights between those of two policies of the same shape; moving along changes the second ones.

    Args:
        start: Weights at alpha 0, which stay as they are.
        end: Weights at alpha 1, in the same order. A copy of them is kept.
    """

    def __init__(self, start: Iterable[Tensor], end: Iterable[Tensor]) -> None:
        pairs = zip(start, end, strict=True)
        self._weights = [(weight, origin.detach(), weight.detach().clone()) for origin, weight in pairs]

    @torch.no_grad()
    def move_to(self, alpha: float) -> None:
        """Give the second ones the values at an alpha."""
        for weight, start, end in self._weights:
            weight.copy_(torch.lerp(start.float(), end.float(), alpha))
