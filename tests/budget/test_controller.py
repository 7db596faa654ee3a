"""The budget controller as a plain object: no Trainer, no policy, numbers in and out."""

import json
import math
import re

import pytest
import torch
from torch import Tensor

from erpd_lightning.budget.controller import MAX_CORRECTION, MAX_RELATIVE_ERROR, BudgetController, spending_warning
from erpd_lightning.budget.search import MAX_EXTRAPOLATION, Measurement
from erpd_lightning.errors import InvalidArgument
from support import reference

BUDGET = 0.05


def states(seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Log-probs of base and first policy over supports of five entries, and a signal."""
    generator = torch.Generator().manual_seed(seed)
    base, first = torch.randn(2, 40, 5, generator=generator).log_softmax(-1)
    return {"base": base, "first": first}, torch.randn(40, 5, generator=generator)


def spent(logps: Tensor, signal: Tensor, beta: float) -> float:
    return float(reference.mean_tilted_kl(logps.numpy(), signal.numpy(), beta))


def test_beta_spends_the_budget() -> None:
    logps, signal = states()
    controller = BudgetController(BUDGET)
    controller.solve(logps, signal)
    assert controller.beta is not None
    assert spent(logps["base"], signal, controller.beta) == pytest.approx(BUDGET, rel=2e-4)
    assert controller.solution is not None
    assert controller.solution.kl_base == pytest.approx(BUDGET, rel=2e-4)
    assert (controller.effective_budget, controller.base_weight) == (BUDGET, 1.0)


def test_a_least_beta_caps_what_is_spent() -> None:
    logps, signal = states()
    free = BudgetController(BUDGET)
    free.solve(logps, signal)
    assert free.beta is not None
    capped = BudgetController(BUDGET, min_beta=2 * free.beta)
    capped.solve(logps, signal)
    assert capped.effective_budget == pytest.approx(spent(logps["base"], signal, 2 * free.beta), rel=1e-6)
    assert capped.beta == pytest.approx(2 * free.beta, rel=1e-3)


def test_two_budgets_have_two_prices() -> None:
    logps, signal = states()
    controller = BudgetController(BUDGET, total_budget=0.4)
    controller.solve(logps, signal)
    assert controller.solution is not None
    prices = (controller.solution.beta_base, controller.solution.beta_first)
    assert min(prices) > 0
    assert controller.beta == pytest.approx(sum(prices))
    assert controller.base_weight == pytest.approx(prices[0] / sum(prices))


@pytest.mark.parametrize("observed", [[1.2], [1.3, 1.1], [1.3, 1.1, 0.9]])
def test_a_correction_by_hand(observed: list[float]) -> None:
    """The budget over the geometric mean of the last two ratios of KLs."""
    logps, signal = states()
    controller = BudgetController(BUDGET)
    controller.solve(logps, signal)
    assert controller.solution is not None
    target = controller.solution.kl_base
    for ratio in observed:
        controller.observe(ratio * target)
    assert controller.correction_due
    controller.correct(logps, signal)
    assert not controller.correction_due
    assert controller.beta is not None
    recent = observed[-2:]
    expected = BUDGET / math.prod(recent) ** (1 / len(recent))
    assert spent(logps["base"], signal, controller.beta) == pytest.approx(expected, rel=5e-4)


@pytest.mark.parametrize(("ratio", "bounded"), [(9.0, MAX_CORRECTION), (0.1, 1 / MAX_CORRECTION)])
def test_a_correction_is_bounded(ratio: float, bounded: float) -> None:
    logps, signal = states()
    controller = BudgetController(BUDGET)
    controller.solve(logps, signal)
    controller.observe(ratio * BUDGET)
    controller.correct(logps, signal)
    assert controller.beta is not None
    assert spent(logps["base"], signal, controller.beta) == pytest.approx(BUDGET / bounded, rel=5e-4)


def test_what_was_not_spent_is_not_observed() -> None:
    logps, signal = states()
    controller = BudgetController(BUDGET)
    controller.solve(logps, signal)
    controller.observe(0.0)
    assert not controller.correction_due


def test_a_correction_beyond_the_signal_leaves_beta() -> None:
    logps, signal = states()
    # All that an argmax can spend, nearly: a student that spends less than that cannot be made to.
    controller = BudgetController(0.999 * spent(logps["base"], signal, 1e-4))
    controller.solve(logps, signal)
    before = controller.beta
    assert controller.kl_budget is not None
    controller.observe(controller.kl_budget / 1.4)
    controller.correct(logps, signal)
    assert controller.beta == before


def test_the_tighter_budget_in_units_of_the_other() -> None:
    controller = BudgetController(BUDGET, total_budget=0.2)
    base = Measurement(0.05, 0.001)
    tighter = controller.tighter(base, Measurement(0.4, 0.04))
    assert (tighter.kl, tighter.stderr) == (pytest.approx(2 * BUDGET), pytest.approx(0.2 * BUDGET))
    assert controller.tighter(base, Measurement(0.1, 0.01)) == base
    assert BudgetController(BUDGET).tighter(base, None) == base


def test_a_budget_on_average_extrapolates_and_one_with_a_margin_does_not() -> None:
    fit = BudgetController(BUDGET).fit_alpha(lambda alpha: Measurement(0.01 * alpha**2))
    assert fit.alpha == MAX_EXTRAPOLATION
    controller = BudgetController(BUDGET, margin=2.0)
    fit = controller.fit_alpha(lambda alpha: Measurement(0.01 * alpha**2, 0.001))
    assert (fit.alpha, fit.measured) == (1.0, Measurement(0.01, 0.001))
    assert controller.fit == fit


@pytest.mark.parametrize(
    ("kl", "stderr", "inside"), [(0.04, 0.004, True), (0.04, 0.006, False), (0.04, math.nan, False), (0.06, 0.0, False)]
)
def test_the_upper_bound_has_to_be_inside(kl: float, stderr: float, inside: bool) -> None:
    controller = BudgetController(BUDGET, margin=2.0)
    assert controller.is_inside(Measurement(kl, stderr)) is inside
    expected = kl + 2 * stderr if math.isfinite(stderr) else math.inf
    assert controller.upper(Measurement(kl, stderr)) == pytest.approx(expected)
    assert BudgetController(BUDGET).upper(Measurement(kl, stderr)) == kl


def test_a_coefficient_is_adapted_by_hand() -> None:
    controller = BudgetController(BUDGET)
    assert controller.adapted(2.0, Measurement(1.1 * BUDGET), 0.5) == pytest.approx(2.0 * 1.05)
    assert controller.adapted(2.0, Measurement(9 * BUDGET), 1.0) == pytest.approx(2.0 * (1 + MAX_RELATIVE_ERROR))
    assert controller.adapted(2.0, Measurement(0.0), 1.0) == pytest.approx(2.0 * (1 - MAX_RELATIVE_ERROR))


@pytest.mark.parametrize(
    ("kl", "stderr", "words"),
    [
        (0.05, 0.001, None),
        (0.057, 0.0, None),
        (0.06, 0.0, "outside its KL budget: 0.06 ± 0 nats per token on fresh samples, 120% of 0.05"),
        (0.06, 0.005, None),  # Noise explains it.
        (4.04, 0.1, "outside"),
        (0.043, 0.0, None),
        (0.0155, 0.001, "far from spending its KL budget: 0.0155 ± 0.001 nats .* 31% of 0.05"),
        (0.04, 0.003, None),
        (0.04, math.nan, "far from"),
        (math.nan, math.nan, ".*nobody knows"),
    ],
)
def test_what_is_told_of_a_spending(kl: float, stderr: float, words: str | None) -> None:
    text = spending_warning(Measurement(kl, stderr), BUDGET)
    assert (text is None) if words is None else re.match(words, text or "")


def test_it_goes_on_from_its_state() -> None:
    logps, signal = states()
    one, other = BudgetController(BUDGET, min_beta=0.5), BudgetController(BUDGET, min_beta=0.5)
    one.solve(logps, signal)
    one.observe(1.2 * BUDGET)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.correction_due
    assert other.effective_budget == one.effective_budget
    for controller in (one, other):
        controller.correct(logps, signal)
    assert one.beta == other.beta
    assert one.state_dict() == other.state_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_budget": 0.0}, "^kl_budget is 0.0: it must be a positive"),
        ({"kl_budget": math.inf}, "^kl_budget is inf"),
        ({"kl_budget": None}, "^kl_budget is None and beta is None: give one of them"),
        ({"kl_budget": 0.1, "beta": 1.0}, "^kl_budget is 0.1 and beta is 1.0"),
        ({"kl_budget": None, "beta": 1.0, "total_budget": 1.0}, "^total_budget goes with kl_budget"),
        ({"kl_budget": 0.1, "total_budget": 1.0, "min_beta": 1.0}, "^min_beta goes with kl_budget alone"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float | None], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        BudgetController(**settings)  # type: ignore[arg-type]


def test_a_budget_out_of_reach() -> None:
    logps, _ = states()
    with pytest.raises(InvalidArgument, match=r"^kl_budget cannot be spent: .*out of reach"):
        BudgetController(BUDGET).solve(logps, torch.zeros(40, 5))
