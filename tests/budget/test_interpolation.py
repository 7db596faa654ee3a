"""The line between two policies, and the search for the place on it where a budget is spent."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from erpd_lightning.budget.interpolation import MOST, Line, land
from support.policies import make_model

BUDGET = 0.05


class Measured:
    """A KL along the line that notes where it was asked for."""

    def __init__(self, kl: Callable[[float], float]) -> None:
        self.kl = kl
        self.shares: list[float] = []

    def __call__(self, share: float) -> float:
        self.shares.append(share)
        return self.kl(share)


def test_by_hand() -> None:
    """0.2 nats at the end: half way along, a quarter of them is left."""
    measured = Measured(lambda share: 0.2 * share**2)
    found = land(measured, BUDGET)
    assert (found.share, found.kl) == (pytest.approx(0.5), pytest.approx(BUDGET))
    assert measured.shares == [1.0, pytest.approx(0.5), pytest.approx(0.5)]


def test_a_trained_policy_inside_the_budget_moves_on() -> None:
    found = land(lambda share: 0.045 * share**2, BUDGET)
    assert found.share == pytest.approx(math.sqrt(0.05 / 0.045))
    assert found.kl == pytest.approx(BUDGET)


def test_no_further_than_what_was_trained() -> None:
    found = land(lambda share: 0.01 * share**2, BUDGET)
    assert (found.share, found.kl) == (MOST, pytest.approx(0.01 * MOST**2))


def test_measurements_nearby_are_taken_together() -> None:
    """The first says 1 / sqrt(1.1), the second, measured there, that this was just right."""
    kls = iter([1.1 * BUDGET, BUDGET])
    measured = Measured(lambda share: next(kls))
    found = land(measured, BUDGET)
    assert measured.shares == [1.0, pytest.approx(1 / math.sqrt(1.1))]
    assert found.share == pytest.approx(1 / math.sqrt(1.1))


def test_measurements_far_away_do_not_count() -> None:
    kls = iter([4 * BUDGET, 1.1 * BUDGET, 0.9 * BUDGET])
    found = land(lambda share: next(kls), BUDGET)
    first = 0.5 / math.sqrt(1.1)
    second = first / math.sqrt(0.9)
    assert found.share == pytest.approx(math.sqrt(first * second))


@pytest.mark.parametrize("power", [1.6, 1.8, 2.2, 2.4])
@pytest.mark.parametrize("kl", [0.04, 0.06, 0.1, 0.5])
def test_a_kl_that_is_no_parabola(power: float, kl: float) -> None:
    measured = Measured(lambda share: kl * share**power)
    found = land(measured, BUDGET, tries=8)
    assert kl * found.share**power == pytest.approx(BUDGET, rel=0.03)
    assert found.kl == BUDGET


def test_noise_of_a_measurement_is_noise_of_the_landing() -> None:
    generator = np.random.default_rng(0)
    landed = []
    for _ in range(200):
        found = land(lambda share: 0.08 * share**2 * math.exp(0.03 * generator.standard_normal()), BUDGET)
        landed.append(0.08 * found.share**2 / BUDGET)
    assert np.mean(landed) == pytest.approx(1, abs=0.01)
    assert np.std(landed) < 0.03 / math.sqrt(2) * 1.2


def test_the_number_of_measurements_is_bounded() -> None:
    shares = iter(range(100))
    measured = Measured(lambda share: 0.5 * BUDGET if next(shares) % 2 else 2 * BUDGET)
    land(measured, BUDGET, tries=3)
    assert len(measured.shares) == 3


@pytest.mark.parametrize("kl", [0.0, -1e-9, math.nan])
def test_a_policy_that_did_not_move(kl: float) -> None:
    assert land(lambda share: kl, BUDGET).share == 1.0


def test_weights_along_the_line() -> None:
    start, end = make_model(0), make_model(1)
    origin, target = copy.deepcopy(start.state_dict()), copy.deepcopy(end.state_dict())
    line = Line(start.parameters(), end.parameters())
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
        Line(torch.nn.Linear(2, 2).parameters(), torch.nn.Linear(2, 2, bias=False).parameters())
