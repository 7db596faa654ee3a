"""Interpolation between two policies, and the search for the alpha at which a budget is spent."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from erpd_lightning.budget.interpolation import WeightInterpolation
from erpd_lightning.budget.search import MAX_EXTRAPOLATION, AlphaFit, Measurement, search_within_budget
from support.policies import make_model

BUDGET = 0.05


def land(measure: Callable[[float], float], budget: float, **settings: int) -> AlphaFit:
    """A search for a budget that is to be spent on average, from what says the KL alone."""

    def measured(alpha: float) -> Measurement:
        return Measurement(measure(alpha))

    return search_within_budget(measured, budget, max_alpha=MAX_EXTRAPOLATION, **settings)


class Curve:
    """A KL along the line that notes where it was asked for."""

    def __init__(self, kl: Callable[[float], float]) -> None:
        self.kl = kl
        self.shares: list[float] = []

    def __call__(self, share: float) -> float:
        self.shares.append(share)
        return self.kl(share)


def test_by_hand() -> None:
    """0.2 nats at the end: half way along, a quarter of them is left."""
    measured = Curve(lambda share: 0.2 * share**2)
    found = land(measured, BUDGET)
    assert (found.alpha, found.kl) == (pytest.approx(0.5), pytest.approx(BUDGET))
    assert measured.shares == [1.0, pytest.approx(0.5), pytest.approx(0.5)]


def test_a_trained_policy_inside_the_budget_moves_on() -> None:
    found = land(lambda share: 0.045 * share**2, BUDGET)
    assert found.alpha == pytest.approx(math.sqrt(0.05 / 0.045))
    assert found.kl == pytest.approx(BUDGET)


def test_no_further_than_what_was_trained() -> None:
    found = land(lambda share: 0.01 * share**2, BUDGET)
    assert (found.alpha, found.kl) == (MAX_EXTRAPOLATION, pytest.approx(0.01 * MAX_EXTRAPOLATION**2))


def test_measurements_nearby_are_taken_together() -> None:
    """The first says 1 / sqrt(1.1), the second, measured there, that this was just right."""
    kls = iter([1.1 * BUDGET, BUDGET])
    measured = Curve(lambda share: next(kls))
    found = land(measured, BUDGET)
    assert measured.shares == [1.0, pytest.approx(1 / math.sqrt(1.1))]
    assert found.alpha == pytest.approx(1 / math.sqrt(1.1))


def test_measurements_far_away_do_not_count() -> None:
    kls = iter([4 * BUDGET, 1.1 * BUDGET, 0.9 * BUDGET])
    found = land(lambda share: next(kls), BUDGET)
    first = 0.5 / math.sqrt(1.1)
    second = first / math.sqrt(0.9)
    assert found.alpha == pytest.approx(math.sqrt(first * second))


@pytest.mark.parametrize("power", [1.6, 1.8, 2.2, 2.4])
@pytest.mark.parametrize("kl", [0.04, 0.06, 0.1, 0.5])
def test_a_kl_that_is_no_parabola(power: float, kl: float) -> None:
    measured = Curve(lambda share: kl * share**power)
    found = land(measured, BUDGET, max_measurements=8)
    assert kl * found.alpha**power == pytest.approx(BUDGET, rel=0.03)
    assert found.kl == BUDGET


def test_noise_of_a_measurement_is_noise_of_the_landing() -> None:
    generator = np.random.default_rng(0)
    landed = []
    for _ in range(200):
        found = land(lambda share: 0.08 * share**2 * math.exp(0.03 * generator.standard_normal()), BUDGET)
        landed.append(0.08 * found.alpha**2 / BUDGET)
    assert np.mean(landed) == pytest.approx(1, abs=0.01)
    assert np.std(landed) < 0.03 / math.sqrt(2) * 1.2


def test_the_number_of_measurements_is_bounded() -> None:
    shares = iter(range(100))
    measured = Curve(lambda share: 0.5 * BUDGET if next(shares) % 2 else 2 * BUDGET)
    land(measured, BUDGET, max_measurements=3)
    assert len(measured.shares) == 3


@pytest.mark.parametrize("kl", [0.0, -1e-9, math.nan])
def test_a_policy_that_did_not_move(kl: float) -> None:
    assert land(lambda share: kl, BUDGET).alpha == 1.0


def test_weights_along_the_line() -> None:
    start, end = make_model(0), make_model(1)
    origin, target = copy.deepcopy(start.state_dict()), copy.deepcopy(end.state_dict())
    line = WeightInterpolation(start.parameters(), end.parameters())
    line.move_to(0.25)
    for name, weight in end.state_dict().items():
        torch.testing.assert_close(weight, 0.75 * origin[name] + 0.25 * target[name])
    line.move_to(0.0)
    assert all(torch.equal(weight, origin[name]) for name, weight in end.state_dict().items())
    line.move_to(1.0)
    assert all(torch.equal(weight, target[name]) for name, weight in end.state_dict().items())
    assert all(torch.equal(weight, origin[name]) for name, weight in start.state_dict().items())


def test_policies_of_different_shapes() -> None:
    with pytest.raises(ValueError, match="argument"):
        WeightInterpolation(torch.nn.Linear(2, 2).parameters(), torch.nn.Linear(2, 2, bias=False).parameters())
