"""Search for the alpha at which a budget is spent, on average or with an upper bound inside it."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from erpd_lightning.budget.search import MAX_EXTRAPOLATION, AlphaFit, Measurement, search_within_budget

BUDGET = 0.05


# A budget on average


def fit_on_average(measure: Callable[[float], float], budget: float, **settings: int) -> AlphaFit:
    """A search for a budget that is to be spent on average, from what says the KL alone."""

    def measured(alpha: float) -> Measurement:
        return Measurement(measure(alpha))

    return search_within_budget(measured, budget, max_alpha=MAX_EXTRAPOLATION, **settings)


class Curve:
    """A KL by alpha that notes where it was asked for."""

    def __init__(self, kl: Callable[[float], float]) -> None:
        self.kl = kl
        self.alphas: list[float] = []

    def __call__(self, alpha: float) -> float:
        self.alphas.append(alpha)
        return self.kl(alpha)


def test_by_hand() -> None:
    """0.2 nats at the end: half way along, a quarter of them is left."""
    measured = Curve(lambda alpha: 0.2 * alpha**2)
    found = fit_on_average(measured, BUDGET)
    assert (found.alpha, found.kl) == (pytest.approx(0.5), pytest.approx(BUDGET))
    assert measured.alphas == [1.0, pytest.approx(0.5), pytest.approx(0.5)]


def test_a_trained_policy_inside_the_budget_moves_on() -> None:
    found = fit_on_average(lambda alpha: 0.045 * alpha**2, BUDGET)
    assert found.alpha == pytest.approx(math.sqrt(0.05 / 0.045))
    assert found.kl == pytest.approx(BUDGET)


def test_no_further_than_what_was_trained() -> None:
    found = fit_on_average(lambda alpha: 0.01 * alpha**2, BUDGET)
    assert (found.alpha, found.kl) == (MAX_EXTRAPOLATION, pytest.approx(0.01 * MAX_EXTRAPOLATION**2))


def test_measurements_nearby_are_taken_together() -> None:
    """The first says 1 / sqrt(1.1), the second, measured there, that this was just right."""
    kls = iter([1.1 * BUDGET, BUDGET])
    measured = Curve(lambda alpha: next(kls))
    found = fit_on_average(measured, BUDGET)
    assert measured.alphas == [1.0, pytest.approx(1 / math.sqrt(1.1))]
    assert found.alpha == pytest.approx(1 / math.sqrt(1.1))


def test_measurements_far_away_do_not_count() -> None:
    kls = iter([4 * BUDGET, 1.1 * BUDGET, 0.9 * BUDGET])
    found = fit_on_average(lambda alpha: next(kls), BUDGET)
    first = 0.5 / math.sqrt(1.1)
    second = first / math.sqrt(0.9)
    assert found.alpha == pytest.approx(math.sqrt(first * second))


@pytest.mark.parametrize("power", [1.6, 1.8, 2.2, 2.4])
@pytest.mark.parametrize("kl", [0.04, 0.06, 0.1, 0.5])
def test_a_kl_that_is_no_parabola(power: float, kl: float) -> None:
    measured = Curve(lambda alpha: kl * alpha**power)
    found = fit_on_average(measured, BUDGET, max_measurements=8)
    assert kl * found.alpha**power == pytest.approx(BUDGET, rel=0.03)
    assert found.kl == BUDGET


def test_noise_of_a_measurement_is_noise_of_the_alpha() -> None:
    generator = np.random.default_rng(0)
    spent = []
    for _ in range(200):
        found = fit_on_average(lambda alpha: 0.08 * alpha**2 * math.exp(0.03 * generator.standard_normal()), BUDGET)
        spent.append(0.08 * found.alpha**2 / BUDGET)
    assert np.mean(spent) == pytest.approx(1, abs=0.01)
    assert np.std(spent) < 0.03 / math.sqrt(2) * 1.2


def test_the_number_of_measurements_is_bounded() -> None:
    alphas = iter(range(100))
    measured = Curve(lambda alpha: 0.5 * BUDGET if next(alphas) % 2 else 2 * BUDGET)
    fit_on_average(measured, BUDGET, max_measurements=3)
    assert len(measured.alphas) == 3


@pytest.mark.parametrize("kl", [0.0, -1e-9, math.nan])
def test_a_policy_that_did_not_move(kl: float) -> None:
    assert fit_on_average(lambda alpha: kl, BUDGET).alpha == 1.0


# A budget as a bound


def test_a_bound_by_hand() -> None:
    """KL grows with the square: from 0 to 0.2, the middle of 95 to 100 % of 0.05 is at sqrt(0.04875 / 0.2)."""
    alphas = []

    def measure(alpha: float) -> Measurement:
        alphas.append(alpha)
        return Measurement(0.2 * alpha**2, 0.0)

    fit = search_within_budget(measure, 0.05, inside=0.0, outside=0.2, margin=1.6)
    assert alphas == [pytest.approx(math.sqrt(0.04875 / 0.2))]
    assert fit.measured is not None
    assert (fit.alpha, fit.measured.kl) == (alphas[0], pytest.approx(0.04875))


@pytest.mark.parametrize("curve", [lambda s: 0.01 + 0.2 * s, lambda s: 0.2 * s**6, lambda s: 0.2 * math.sqrt(s)])
def test_a_bound_along_other_curves(curve: Callable[[float], float]) -> None:
    fit = search_within_budget(
        lambda alpha: Measurement(curve(alpha), 0.0005), 0.05, inside=curve(0.0), outside=curve(1.0), margin=1.6
    )
    assert fit.measured is not None
    assert 0.0475 <= curve(fit.alpha) <= 0.05 - 1.6 * 0.0005


def test_a_search_too_noisy_to_be_near_takes_what_is_surely_inside() -> None:
    fit = search_within_budget(
        lambda alpha: Measurement(0.2 * alpha**2, 0.01 * alpha), 0.05, inside=0.0, outside=0.2, margin=1.6
    )
    found = fit.measured
    assert found is not None
    assert found.kl + 1.6 * found.stderr <= 0.05
    assert found.kl > 0.035


def test_nothing_inside_is_alpha_0() -> None:
    fit = search_within_budget(lambda alpha: Measurement(0.06, 0.0), 0.05, inside=0.04, outside=0.2, margin=1.6)
    assert fit == AlphaFit(0.0, 0.04, None)
