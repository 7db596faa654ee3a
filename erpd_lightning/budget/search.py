"""Search along interpolated weights for the alpha at which a KL budget is spent, by a few noisy measurements. Ours."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NEARBY = 0.1
"""Measurements at alphas that differ by less than this share are taken together: there, KL grows with the square."""

SAFE_SHARE = 0.97
"""The share of the largest KL that would be inside that is aimed at where noise leaves no room for a tolerance."""

MIN_POWER, MAX_POWER = 0.25, 8.0
"""Between which the power of alpha is looked for that KL grows with."""

MAX_OUTSIDE = 5
"""Measurements outside in a row after which the search halves: where KL is flat, it would come nearer too slowly."""

MAX_EXTRAPOLATION = 1.25
"""How far beyond the trained policy a budget is looked for: what lies further was hardly seen in training."""


@dataclass(frozen=True)
class Measurement:
    """A KL and its standard error, in the unit of the budget."""

    kl: float
    stderr: float = 0.0


@dataclass(frozen=True)
class AlphaFit:
    """Where between two policies a budget is spent.

    Attributes:
        alpha: The place: 0 is the first policy, 1 the second.
        kl: The KL there, by the measurements nearby and the square of alpha.
        measured: What was measured at this very place; None where `kl` is an estimate.
    """

    alpha: float
    kl: float
    measured: Measurement | None = None


def search_within_budget(
    measure: Callable[[float], Measurement],
    budget: float,
    *,
    inside: float = 0.0,
    outside: float | None = None,
    margin: float | None = None,
    tolerance: float = 0.05,
    max_alpha: float = 1.0,
    max_measurements: int = 10,
) -> AlphaFit:
    """The alpha between two policies at which a KL budget is spent.

    Each measurement says at which alpha the KL aimed at would be, if from alpha 0 on KL grew with the square of alpha,
    or with the power that measurements far apart tell once there are three. The search goes there, or half way between
    the largest alpha known to be inside and the smallest known to be outside where it is not between the two, where the
    KL is infinite, or where with a margin nothing but alphas outside were found lately.

    Without a `margin` the budget is what is spent on average: the search ends where two measurements are close
    together, at the geometric mean of what they say. With one the budget is a bound: an alpha is inside where the upper
    confidence bound `kl + margin * stderr` is at most the budget, and near enough where the KL is no less than
    `1 - tolerance` of it, and only an alpha that was measured counts.

    Args:
        measure: KL at an alpha; each call draws anew.
        budget: KL to spend, or with a margin the most KL.
        inside: KL at alpha 0.
        outside: KL at alpha 1; None where it is to be measured first.
        margin: Standard errors between the KL and its upper confidence bound; None for a budget on average.
        tolerance: With a margin, the most of the budget that is to be left, as a share of it.
        max_alpha: The largest alpha.
        max_measurements: The most measurements.

    Returns:
        The alpha. With a margin, the first that is near enough, or else of those inside that with the most KL; alpha 0,
        with nothing measured, where none was inside.
    """
    origin = max(inside, 0.0)  # Rounding may leave a KL slightly negative.
    low, high, alpha = 0.0, math.inf, 1.0  # the largest alpha known to be inside, the smallest outside, the next one
    if outside is not None:
        high, place = 1.0, _place(_aim(budget, margin, tolerance, 0.0) - origin, outside - origin, 1.0)
        alpha = _next_alpha(place, low, high)
    measured: list[tuple[float, float]] = []
    power, outside_in_a_row = 2.0, 0
    best = AlphaFit(0.0, inside)
    for _ in range(max_measurements):
        found = measure(alpha)
        if found.kl == math.inf:
            high, alpha = alpha, (low + alpha) / 2
            continue
        measured.append((alpha, found.kl - origin))
        is_inside = found.kl + (margin or 0.0) * found.stderr <= budget
        low, high = (max(low, alpha), high) if is_inside else (low, min(high, alpha))
        outside_in_a_row = 0 if is_inside else outside_in_a_row + 1
        if margin is None:
            if not found.kl > 0:  # The second policy is the first one.
                return AlphaFit(alpha, found.kl)
            nearby = [_place(budget - origin, kl, at) for at, kl in measured if abs(at / alpha - 1) < NEARBY]
            wanted = math.prod(nearby) ** (1 / len(nearby))
            best = AlphaFit(min(wanted, max_alpha), budget * (min(wanted, max_alpha) / wanted) ** 2)
            if len(nearby) > 1:
                break
        else:
            if is_inside and (best.measured is None or found.kl > best.kl):
                best = AlphaFit(alpha, found.kl, found)
            if is_inside and (found.kl >= (1 - tolerance) * budget or alpha >= max_alpha):
                break
        if len(measured) > 2:
            power = _power(measured, power)
        aim = _aim(budget, margin, tolerance, found.stderr) - origin
        place = min(_place(aim, found.kl - origin, alpha, power), max_alpha)
        if margin is not None and outside_in_a_row >= MAX_OUTSIDE:
            place = math.nan
        alpha = _next_alpha(place, low, high, again=margin is None)
    return best


def _next_alpha(place: float, low: float, high: float, again: bool = False) -> float:
    """The place, or half way between what is inside and what is outside where it is not between the two.

    What was measured is measured `again` where measurements are averaged.
    """
    between = low <= place <= high if again else low < place < high
    return place if high == math.inf or between else (low + high) / 2


def _aim(budget: float, margin: float | None, tolerance: float, stderr: float) -> float:
    """The KL to aim at: the budget itself, or the middle of what is both inside and near enough."""
    if margin is None:
        return budget
    least, most = (1 - tolerance) * budget, max(budget - margin * stderr, 0.0)
    return (least + most) / 2 if least < most else SAFE_SHARE * most


def _place(aim: float, kl: float, alpha: float, power: float = 2.0) -> float:
    """Where the KL aimed at is, if KL grows with a power of alpha from 0 to `kl` at `alpha`; NaN if it does not."""
    return alpha * math.sqrt(aim / kl) ** (2 / power) if kl > 0 <= aim else math.nan


def _power(measured: Sequence[tuple[float, float]], power: float) -> float:
    """The power of alpha with which KL grows by the last two measurements, or the one so far where they tell none."""
    (first, kl_first), (second, kl_second) = measured[-2:]
    if abs(first / second - 1) < NEARBY or not min(kl_first, kl_second) > 0:
        return power
    found = math.log(kl_first / kl_second) / math.log(first / second)
    return min(max(found, MIN_POWER), MAX_POWER)
