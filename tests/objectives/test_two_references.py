"""A target between two references, against loops, and its prices against every policy of a grid."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from erpd_lightning.objectives import (
    LOG_ZERO,
    UnreachableBudget,
    solve_beta,
    solve_two_references,
    tilt,
    tilt_two_references,
)
from support import reference


def some_states(count: int = 30, size: int = 5, apart: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Base policy, first policy and signal, `(count, size)` each."""
    first = torch.randn(count, size, dtype=torch.float64)
    base = first + apart * torch.randn_like(first)
    return base.log_softmax(-1), first.log_softmax(-1), 2 * torch.randn_like(first)


def measured(base: Any, first: Any, signal: Any, found: Any) -> tuple[float, float]:
    """Both mean KLs of the target, from loops."""
    target = reference.two_references(base, first, signal, found.beta_base, found.beta_first)
    kls = (reference.kl(target, base), reference.kl(target, first))
    one, two = (float(np.mean(kl)) for kl in kls)
    return one, two


def test_target_by_hand() -> None:
    base, first, signal = torch.tensor([[0.5, 0.5], [0.8, 0.2], [2.0, 1.0]], dtype=torch.float64).log()
    # sqrt(.5 * .8) e^{ln 2 / 2} : sqrt(.5 * .2) = sqrt(.8) : sqrt(.1) = sqrt(8) : 1
    target = tilt_two_references(base, first, signal, 1.0, 1.0)
    assert target.exp().tolist() == pytest.approx([8**0.5 / (1 + 8**0.5), 1 / (1 + 8**0.5)], abs=1e-12)
    # prices 3 and 1: (.5^3 * .8)^(1/4) * 2^(1/4) : (.5^3 * .2)^(1/4) = 8^(1/4) : 1
    target = tilt_two_references(base, first, signal, 3.0, 1.0)
    assert target.exp()[0].item() == pytest.approx(8**0.25 / (1 + 8**0.25), abs=1e-12)


@pytest.mark.parametrize(("one", "two"), [(0.5, 1.5), (2.0, 0.1), (1.0, 1.0)])
def test_target_agrees_with_reference_and_maximises_its_objective(one: float, two: float) -> None:
    base, first, signal = some_states(6, 4)
    target = tilt_two_references(base, first, signal, one, two)
    assert target.numpy() == pytest.approx(reference.two_references(base, first, signal, one, two), abs=1e-12)

    def gain(logp: Tensor) -> Tensor:
        p = logp.exp()
        return (p * (signal - one * (logp - base) - two * (logp - first))).sum(-1)

    best = gain(target)
    for size in (1e-3, 0.1, 2.0):
        assert (gain((target + size * torch.randn_like(target)).log_softmax(-1)) < best).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_target_with_one_price_or_equal_references_is_the_tilt(dtype: torch.dtype) -> None:
    base, first, signal = (x.to(dtype) for x in some_states())
    assert torch.equal(tilt_two_references(base, first, signal, 0.7, 0.0), tilt(base, signal, 0.7))
    assert torch.equal(tilt_two_references(base, first, signal, 0.0, 0.7), tilt(first, signal, 0.7))
    torch.testing.assert_close(tilt_two_references(base, base, signal, 0.3, 0.4), tilt(base, signal, 0.7))


@pytest.mark.parametrize("nothing", [LOG_ZERO, -math.inf])
@pytest.mark.parametrize(("one", "two"), [(0.3, 0.4), (0.7, 0.0), (0.0, 0.7), (1e-4, 1e4)])
def test_padding_never_gets_mass(nothing: float, one: float, two: float) -> None:
    base, first, signal = some_states()
    filled = ((base, nothing), (first, nothing), (signal, 9.0))
    padded = [torch.nn.functional.pad(x, (1, 1), value=value) for x, value in filled]
    target = tilt_two_references(padded[0], padded[1], padded[2], one, two)
    assert (target[:, [0, -1]] == LOG_ZERO).all()
    torch.testing.assert_close(target[:, 1:-1], tilt_two_references(base, first, signal, one, two))


# --- the prices -----------------------------------------------------------------------------


def best_on_a_grid(
    states: tuple[Tensor, Tensor, Tensor], policies: Any, budget: float, total: float
) -> tuple[float, Any]:
    """The most signal within both budgets, and the policy that has it; `policies` are `(M, states, entries)`."""
    base, first, signal = (reference.array(x) for x in states)
    logs = np.log(policies)
    gain = (policies * signal).sum(-1).mean(-1)
    within = [
        (policies * (logs - reference)).sum(-1).mean(-1) <= most for reference, most in ((base, budget), (first, total))
    ]
    gain = np.where(within[0] & within[1], gain, -np.inf)
    return float(gain.max()), policies[gain.argmax()]


def one_state_of_three(steps: int = 400) -> Any:
    grid = (np.arange(steps) + 0.5) / steps
    one, two = (x.ravel() for x in np.meshgrid(grid, grid))
    inside = one + two < 1 - 1e-9
    return np.stack([one, two, 1 - one - two], -1)[inside][:, None]


def two_states_of_two(steps: int = 500) -> Any:
    grid = (np.arange(steps) + 0.5) / steps
    one, two = (x.ravel() for x in np.meshgrid(grid, grid))
    return np.stack([np.stack([one, 1 - one], -1), np.stack([two, 1 - two], -1)], 1)


STATES: dict[str, tuple[Any, Any, Any, Any]] = {
    "one state": (one_state_of_three, [[0.2, 0.5, 0.3]], [[0.4, 0.25, 0.35]], [[0.0, 1.0, 1.6]]),
    "two states": (
        two_states_of_two,
        [[0.5, 0.5], [0.3, 0.7]],
        [[0.3, 0.7], [0.5, 0.5]],
        [[0.0, 1.0], [0.0, 2.0]],
    ),
}


@pytest.mark.parametrize(
    ("budget", "total", "binding"),
    [(0.03, 1.0, "base"), (1.0, 0.1, "first"), (0.03, 0.12, "both"), (0.05, 0.11, "both")],
)
@pytest.mark.parametrize("name", STATES)
def test_no_policy_has_more_of_the_signal_within_both_budgets(
    name: str, budget: float, total: float, binding: str
) -> None:
    make, *tables = STATES[name]
    base, first, signal = (torch.tensor(table, dtype=torch.float64) for table in tables)
    states = (base.log(), first.log(), signal)
    found = solve_two_references(*states, budget, total, tolerance=1e-7)
    assert measured(*states, found) == pytest.approx((found.kl_base, found.kl_first), abs=1e-9)
    assert found.kl_base <= budget * (1 + 1e-6)
    assert found.kl_first <= total * (1 + 1e-6)
    assert (found.beta_base > 0) == (binding != "first"), found
    assert (found.beta_first > 0) == (binding != "base"), found
    # What has a price is spent.
    if found.beta_base > 0:
        assert found.kl_base == pytest.approx(budget, rel=1e-5)
    if found.beta_first > 0:
        assert found.kl_first == pytest.approx(total, rel=1e-5)
    target = tilt_two_references(*states, found.beta_base, found.beta_first).exp()
    gain = float((target * signal).sum(-1).mean())
    best, policy = best_on_a_grid(states, make(), budget, total)
    assert best - 1e-9 <= gain <= best + 0.01
    assert np.abs(target.numpy() - policy).max() < 0.05


@pytest.mark.parametrize("budget", [0.02, 0.1])
def test_equal_references_or_a_total_that_does_not_bind_are_one_reference(budget: float) -> None:
    base, first, signal = some_states()
    alone = solve_beta(base, signal, budget)
    for total in (budget, 2 * budget, 50.0):
        found = solve_two_references(base, base, signal, budget, total)
        assert (found.beta_base, found.beta_first) == (alone.beta, 0.0)
        assert found.kl_base == pytest.approx(alone.kl, rel=1e-9)
    found = solve_two_references(base, base, signal, 2 * budget, budget)
    assert (found.beta_base, found.beta_first) == (0.0, alone.beta)
    found = solve_two_references(base, first, signal, budget, 50.0)
    assert (found.beta_base, found.beta_first, found.kl_base) == (alone.beta, 0.0, pytest.approx(alone.kl))
    found = solve_two_references(base, first, signal, 50.0, budget)
    assert (found.beta_base, found.beta_first) == (0.0, solve_beta(first, signal, budget).beta)


def both_bind(states: tuple[Tensor, Tensor, Tensor], budget: float = 0.05, slack: float = 0.6) -> float:
    """A total that binds beside a budget: short of what the budget alone would take it to."""
    base, first, signal = states
    free = solve_two_references(base, first, signal, budget, 50.0)
    start = float(np.mean(reference.kl(base, first)))
    return start + slack * (free.kl_first - start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_both_budgets_are_spent_where_both_bind(tolerance: float, dtype: torch.dtype) -> None:
    base, first, signal = (x.to(dtype) for x in some_states(60))
    total = both_bind((base, first, signal))
    found = solve_two_references(base, first, signal, 0.05, total, tolerance=tolerance)
    assert found.beta_base > 0
    assert found.beta_first > 0
    assert measured(base, first, signal, found) == pytest.approx((0.05, total), rel=tolerance)


@pytest.mark.parametrize("chunk", [1, 7, 20])
def test_chunks_make_no_difference(chunk: int) -> None:
    states = some_states(20)
    total = both_bind(states)
    found = solve_two_references(*states, 0.05, total, tolerance=1e-7, chunk=chunk)
    assert measured(*states, found) == pytest.approx((found.kl_base, found.kl_first), abs=1e-9)
    whole = solve_two_references(*states, 0.05, total, tolerance=1e-7)
    assert found.beta_base == pytest.approx(whole.beta_base, rel=1e-4)
    assert found.beta_first == pytest.approx(whole.beta_first, rel=1e-4, abs=1e-6)


def test_budgets_that_exclude_each_other_say_what_is_within_reach() -> None:
    base, first, signal = some_states(apart=1.0)
    start = float(np.mean(reference.kl(base, first)))
    with pytest.raises(UnreachableBudget, match=r"whatever is within 0\.01 of the base policy is at least") as error:
        solve_two_references(base, first, signal, 0.01, 0.1 * start)
    least = float(str(error.value).split("at least ")[1].split()[0])
    assert 0.1 * start < least < start
    assert len(str(error.value).splitlines()) == 1
    # Just short of it there is a policy, and just beyond there is none.
    found = solve_two_references(base, first, signal, 0.01, 1.05 * least)
    assert found.kl_first == pytest.approx(1.05 * least, rel=1e-3)
    assert found.kl_base == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(UnreachableBudget):
        solve_two_references(base, first, signal, 0.01, 0.99 * least)


def test_a_signal_that_can_spend_neither_budget() -> None:
    base, first, signal = some_states()
    with pytest.raises(UnreachableBudget, match="both out of reach"):
        solve_two_references(base, first, torch.zeros_like(signal), 0.05, 0.5)
    with pytest.raises(UnreachableBudget, match="both out of reach"):
        solve_two_references(base, first, signal, 50.0, 50.0)


@pytest.mark.parametrize("budget", [0.0, -1.0, math.inf, math.nan])
def test_budgets_that_are_no_positive_numbers(budget: float) -> None:
    states = some_states()
    for budgets in ((budget, 0.1), (0.1, budget)):
        with pytest.raises(ValueError, match="budget is") as error:
            solve_two_references(*states, *budgets)
        assert not isinstance(error.value, UnreachableBudget)
    with pytest.raises(ValueError, match="no states"):
        solve_two_references(states[0][:0], states[1][:0], states[2][:0], 0.1, 0.1)
