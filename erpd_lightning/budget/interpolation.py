"""The line between two policies' weights, and the points on it where a KL budget is spent.

Between a base policy and what was trained from it, weights can be mixed: `base + share * (trained - base)`. KL to the
base policy grows along the line, near the base with the square of the share. Mixing of weights: arXiv 2109.01903, and
towards the initial policy of reinforcement learning arXiv 2406.16768; the search for a budget is ours.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

NEAR = 0.1
"""Measurements at shares that differ by less than this are taken together: there, KL grows with the square."""

SURELY = 0.97
"""What share of the KL that would be just inside is aimed at where noise leaves no room for a tolerance."""

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
    """The weights between those of two policies of the same shape; moving along changes the second ones.

    Args:
        start: Weights at share 0, which stay as they are.
        end: Weights at share 1, in the same order. A copy of them is kept.
    """

    def __init__(self, start: Iterable[Tensor], end: Iterable[Tensor]) -> None:
        pairs = zip(start, end, strict=True)
        self._weights = [(weight, origin.detach(), weight.detach().clone()) for origin, weight in pairs]

    @torch.no_grad()
    def move_to(self, share: float) -> None:
        """Give the second ones the values at a place on the line."""
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


@dataclass(frozen=True)
class Measured:
    """A KL and its standard error, in the unit of the budget."""

    kl: float
    stderr: float


def go_back(
    measure: Callable[[float], Measured],
    budget: float,
    *,
    inside: float,
    outside: float,
    margin: float,
    tolerance: float = 0.05,
    tries: int = 10,
) -> tuple[float, Measured | None]:
    """The place on a line, from weights inside a budget (share 0) to weights outside (1), where it is nearly spent.

    What counts is the upper confidence bound: a place is inside where `kl + margin * stderr` is at most the budget, and
    near enough where the KL is no less than `1 - tolerance` of it. The search aims at the middle of what is left
    between the two, by a root of KL that is linear in the share between the nearest places on both sides, and halves
    where that does not lead on.

    Args:
        measure: KL at a share; each call draws anew.
        budget: The most KL.
        inside: KL at share 0.
        outside: KL at share 1.
        margin: Standard errors between the KL and its upper confidence bound.
        tolerance: The most of the budget that is to be left, as a share of it.
        tries: Most measurements.

    Returns:
        The share, and what was measured there: the first near enough, or else of those inside that with the most KL;
        share 0 and None where no place was inside.
    """
    low, high = (0.0, max(inside, 0.0)), (1.0, outside)
    best: tuple[float, Measured | None] = (0.0, None)
    stderr, sides = 0.0, ""
    least = (1 - tolerance) * budget
    for _ in range(tries):
        most = max(budget - margin * stderr, 0.0)
        aim = (least + most) / 2 if least < most else SURELY * most
        part = (math.sqrt(aim) - math.sqrt(low[1])) / max(math.sqrt(high[1]) - math.sqrt(low[1]), 1e-12)
        if not 0 < part < 1 or sides[-2:] in ("<<", ">>"):  # A root of KL is not what is linear here.
            part = 0.5
        share = low[0] + part * (high[0] - low[0])
        found = measure(share)
        stderr = found.stderr
        if found.kl + margin * stderr > budget:
            high, sides = (share, found.kl), sides + ">"
            continue
        if best[1] is None or found.kl > best[1].kl:
            best = (share, found)
        if found.kl >= least:
            break
        low, sides = (share, max(found.kl, 0.0)), sides + "<"
    return best
