"""The line between two policies' weights, and the point on it where a KL budget is spent.

Between a base policy and what was trained from it, weights can be mixed: `base + share * (trained - base)`. KL to the
base policy grows along the line, near the base with the square of the share. Mixing of weights: arXiv 2109.01903, and
towards the initial policy of reinforcement learning arXiv 2406.16768; the search for a budget is ours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

NEAR = 0.1
"""Measurements at shares that differ by less than this are taken together: there, KL grows with the square."""

MOST = 1.25
"""How far beyond the trained policy the search goes: what lies further was hardly seen in training."""


@dataclass(frozen=True)
class Landing:
    """Where on the line a budget is spent.

    Attributes:
        share: The place: 0 is the base policy, 1 the trained one.
        kl: The KL there, in nats per token, by the measurements nearby and the square of the share.
    """

    share: float
    kl: float


class Line:
    """The weights between two policies of the same shape; moving along changes the second one.

    Args:
        start: The policy at share 0, which stays as it is.
        end: The policy at share 1. A copy of its weights is kept.
    """

    def __init__(self, start: nn.Module, end: nn.Module) -> None:
        pairs = zip(start.parameters(), end.parameters(), strict=True)
        self._weights = [(weight, origin.detach(), weight.detach().clone()) for origin, weight in pairs]

    @torch.no_grad()
    def move_to(self, share: float) -> None:
        """Give the second policy the weights at a place on the line."""
        for weight, start, end in self._weights:
            weight.copy_(torch.lerp(start.float(), end.float(), share))


def land(measure: Callable[[float], float], budget: float, *, tries: int = 5) -> Landing:
    """The place on a line where a KL budget is spent, by a few noisy measurements.

    Each measurement says where the budget would be spent if KL grew with the square of the share. The search goes
    to the geometric mean of what those nearby say, and ends when there are two of them.

    Args:
        measure: KL at a share, in nats per token; each call draws anew.
        budget: KL to spend, in nats per token.
        tries: Most measurements.
    """
    share = wanted = 1.0
    places: list[tuple[float, float]] = []
    for _ in range(tries):
        kl = measure(share)
        if not kl > 0:  # The trained policy is the base policy: there is no line to go along.
            return Landing(share, kl)
        places.append((share, share * math.sqrt(budget / kl)))
        near = [place for at, place in places if abs(at / share - 1) < NEAR]
        wanted = math.prod(near) ** (1 / len(near))
        if len(near) > 1:
            break
        share = min(wanted, MOST)
    share = min(wanted, MOST)
    return Landing(share, budget * (share / wanted) ** 2)
