import dataclasses
import math
import re

import pytest
import torch
from torch import Tensor

from erpd_lightning.objectives import (
    BetaSolution,
    Signal,
    Term,
    UnreachableBudget,
    mean_tilted_kl,
    solve_beta,
    tilt,
    tilted_kl,
)
from erpd_lightning.objectives.tilted_policy import LOG_ZERO
from support import reference
from support.reference import grad

BETAS = [0.1, 0.5, 1.0, 3.0, 40.0]
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])


def some_states(*shape: int, padded: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Base log-probs and a signal in +-3; the slots before the tail are padding."""
    base = torch.log_softmax(2 * torch.randn(shape, dtype=dtype), -1)
    signal = (2 * torch.randn(shape, dtype=dtype)).clamp(-3, 3)
    if padded:
        pad = torch.full((*shape[:-1], padded), LOG_ZERO, dtype=dtype)
        base = torch.cat([base[..., :-1], pad, base[..., -1:]], -1)
        signal = torch.cat([signal[..., :-1], torch.zeros_like(pad), signal[..., -1:]], -1)
    return base, signal


def test_log_zero() -> None:
    assert LOG_ZERO == -100.0


def test_by_hand() -> None:
    base = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    signal = torch.tensor([0.0, math.log(2.0), 0.0], dtype=torch.float64)
    # beta 1: (.5, .25 * 2, .25) / 1.25 = (.4, .4, .2)
    assert tilt(base, signal, 1.0).exp().tolist() == pytest.approx([0.4, 0.4, 0.2], abs=1e-12)
    # KL = .4 ln(.4/.5) + .4 ln(.4/.25) + .2 ln(.2/.25) = .6 ln .8 + .4 ln 1.6
    assert tilted_kl(base, signal, 1.0).item() == pytest.approx(0.05411532090976828, abs=1e-12)
    # beta 1/2: (.5, .25 * 4, .25) / 1.75
    assert tilt(base, signal, 0.5).exp().tolist() == pytest.approx([2 / 7, 4 / 7, 1 / 7], abs=1e-12)


@DTYPES
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("padded", [0, 2])
def test_agrees_with_reference(beta: float, padded: int, dtype: torch.dtype, tolerance: float) -> None:
    base, signal = some_states(2, 3, 4, padded=padded, dtype=dtype)
    target = tilt(base, signal, beta)
    assert target.dtype == dtype
    assert target.numpy() == pytest.approx(reference.tilt(base, signal, beta), rel=tolerance, abs=tolerance)
    divergence = tilted_kl(base, signal, beta)
    assert divergence.shape == (2, 3)
    assert divergence.numpy() == pytest.approx(reference.tilted_kl(base, signal, beta), rel=tolerance, abs=tolerance)


def test_beta_may_be_a_tensor() -> None:
    base, signal = some_states(3, 4)
    torch.testing.assert_close(tilt(base, signal, torch.tensor(0.3).double()), tilt(base, signal, 0.3))


@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
def test_maximises_the_regularised_signal_over_the_simplex(beta: float) -> None:
    """Brute force: no point of a fine grid is better, and the best of them is next to it."""
    base, signal = some_states(3)
    q, s = base.exp().tolist(), signal.tolist()
    policy = tilt(base, signal, beta).exp().tolist()
    reached = reference.tilt_objective(policy, q, s, beta)
    assert sum(policy) == pytest.approx(1.0, abs=1e-12)
    # at the maximum the objective is beta log E_base[exp(s / beta)]
    log_partition = math.log(sum(b * math.exp(v / beta) for b, v in zip(q, s, strict=True)))
    assert reached == pytest.approx(beta * log_partition, abs=1e-12)

    steps, best, best_policy = 150, -math.inf, (0.0, 0.0, 0.0)
    for i in range(steps + 1):
        for j in range(steps + 1 - i):
            point = (i / steps, j / steps, (steps - i - j) / steps)
            value = reference.tilt_objective(point, q, s, beta)
            if value > best:
                best, best_policy = value, point
    assert best <= reached + 1e-12
    assert best_policy == pytest.approx(policy, abs=1.5 / steps)


@pytest.mark.parametrize("beta", BETAS)
def test_is_a_stationary_point_of_the_regularised_signal(beta: float) -> None:
    base, signal = some_states(6)
    logits = tilt(base, signal, beta).detach().clone().requires_grad_()
    policy = torch.softmax(logits, -1)
    objective = (policy * (signal - beta * (torch.log_softmax(logits, -1) - base))).sum()
    (gradient,) = torch.autograd.grad(objective, logits)
    torch.testing.assert_close(gradient, torch.zeros(6).double(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("padded", [0, 2])
def test_beta_one_of_teacher_over_base_without_clip_is_the_teacher(padded: int) -> None:
    base, _ = some_states(4, 5, padded=padded)
    teacher, _ = some_states(4, 5, padded=padded)
    signal = Signal([Term("teacher", "base", clip=1e9)])({"teacher": teacher, "base": base})
    torch.testing.assert_close(tilt(base, signal, 1.0), teacher, rtol=1e-12, atol=1e-12)


def test_a_constant_added_to_the_signal_of_a_state_changes_nothing() -> None:
    base, signal = some_states(3, 4, padded=1)
    shifted = signal + torch.tensor([[2.0], [-1.0], [0.5]])
    torch.testing.assert_close(tilt(base, shifted, 0.3), tilt(base, signal, 0.3))


def test_gradients() -> None:
    base, signal = some_states(2, 4)
    base.requires_grad_()
    signal.requires_grad_()
    assert torch.autograd.gradcheck(lambda b, s: tilt(b, s, 0.7), (base, signal))
    assert torch.autograd.gradcheck(lambda b, s: tilted_kl(b, s, 0.7), (base, signal))


@pytest.mark.parametrize("padded", [0, 2])
def test_kl_falls_in_beta(padded: int) -> None:
    base, signal = some_states(20, 5, padded=padded)
    betas = [1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0]
    divergences = torch.stack([tilted_kl(base, signal, beta) for beta in betas])
    assert (divergences.diff(dim=0) <= 0).all()
    middle = divergences[2:].diff(dim=0)
    assert (middle < 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_kl_is_never_negative(beta: float, dtype: torch.dtype) -> None:
    base, signal = some_states(500, 5, padded=1, dtype=dtype)
    assert (tilted_kl(base, signal, beta) >= 0).all()


@DTYPES
@pytest.mark.parametrize("beta", [1e-6, 1e-4, 1e-3, 1.0])
def test_signals_tied_at_the_clip_share_by_the_base(beta: float, dtype: torch.dtype, tolerance: float) -> None:
    """Clipped signals tie: the limit is the base restricted to the tied entries."""
    base = torch.tensor([0.1, 0.3, 0.4, 0.2], dtype=dtype).log()
    signal = torch.tensor([3.0, 3.0, -3.0, -3.0], dtype=dtype)
    target = tilt(base, signal, beta)
    assert torch.isfinite(target).all()
    assert (target[1] - target[0]).item() == pytest.approx(math.log(3.0), abs=tolerance)
    assert target.exp().sum().item() == pytest.approx(1.0, abs=tolerance)
    if beta < 1:
        assert target.exp().tolist() == pytest.approx([0.25, 0.75, 0.0, 0.0], abs=tolerance)
        assert tilted_kl(base, signal, beta).item() == pytest.approx(math.log(2.5), abs=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [1e-6, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("size", [3.0, 1e4])
def test_extreme_values_stay_finite_in_value_and_gradient(beta: float, size: float, dtype: torch.dtype) -> None:
    base, signal = some_states(6, 5, padded=2, dtype=dtype)
    signal = (signal.sign() * size).requires_grad_()
    base.requires_grad_()
    target = tilt(base, signal, beta)
    divergence = tilted_kl(base, signal, beta)
    assert torch.isfinite(target).all()
    assert torch.isfinite(divergence).all()
    torch.testing.assert_close(target.exp().sum(-1), torch.ones(6, dtype=dtype), rtol=0, atol=1e-5)
    (target.exp() * torch.arange(7)).sum().add(divergence.sum()).backward()
    assert torch.isfinite(grad(base)).all()
    assert torch.isfinite(grad(signal)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [1e-6, 1e-2, 0.02, 1.0, 1e6])
@pytest.mark.parametrize("pad_signal", [0.0, 3.0, 1e4])
def test_padding_never_gets_mass(beta: float, pad_signal: float, dtype: torch.dtype) -> None:
    """Not even where every real entry is disliked and the padding is not."""
    base = torch.tensor([0.6, 0.3, 0.0, 0.0, 0.1], dtype=dtype).log()
    base = base.masked_fill(base == -math.inf, LOG_ZERO)
    signal = torch.tensor([-3.0, -2.5, pad_signal, pad_signal, -3.0], dtype=dtype)
    target = tilt(base, signal, beta)
    assert torch.isfinite(target).all()
    assert (target[2:4] <= LOG_ZERO + 1e-3).all()
    real = torch.tensor([0, 1, 4])
    torch.testing.assert_close(target[real].exp(), tilt(base[real], signal[real], beta).exp())
    torch.testing.assert_close(tilted_kl(base, signal, beta), tilted_kl(base[real], signal[real], beta))


@pytest.mark.parametrize("beta", [1e-6, 1.0])
def test_a_state_that_is_all_padding_spends_nothing_and_leaks_nothing(beta: float) -> None:
    base, signal = some_states(3, 4)
    base[1], signal[1] = LOG_ZERO, 0.0
    base.requires_grad_()
    target, divergence = tilt(base, signal, beta), tilted_kl(base, signal, beta)
    assert torch.isfinite(target).all()
    assert (target[1] <= LOG_ZERO + 1e-3).all()
    assert divergence[1].abs().item() < 1e-12
    (target.exp().sum() + divergence.sum()).backward()
    assert torch.isfinite(grad(base)).all()


@pytest.mark.parametrize("nothing", [-100.5, -1e4, -math.inf])
def test_probability_zero_below_log_zero_is_padding_too(nothing: float) -> None:
    base = torch.tensor([math.log(0.75), nothing, math.log(0.25)], requires_grad=True)
    signal = torch.tensor([0.0, 3.0, math.log(3.0)])
    # .75 : .25 * 3 without the slot between them; KL = ln(2/3)/2 + ln(2)/2 = ln(4/3)/2
    target, divergence = tilt(base, signal, 1.0), tilted_kl(base, signal, 1.0)
    assert target.tolist() == pytest.approx([-math.log(2), LOG_ZERO, -math.log(2)], abs=1e-5)
    assert divergence.item() == pytest.approx(0.14384103622589045, abs=1e-6)
    (target.sum() + divergence).backward()
    assert torch.isfinite(grad(base)).all()


def test_the_mean_kl_over_states() -> None:
    base, signal = some_states(50, 5, padded=1)
    each = tilted_kl(base.double(), signal.double(), 0.7)
    assert mean_tilted_kl(base, signal, 0.7) == pytest.approx(float(each.mean()), rel=1e-12)
    assert mean_tilted_kl(base, signal, 0.7, chunk=7) == pytest.approx(float(each.mean()), rel=1e-12)


# --- solve_beta -----------------------------------------------------------------------------


def test_solve_beta_by_hand() -> None:
    # one state (1/2, 1/2) with s = (ln 3, 0): at beta = 1 the target is (3/4, 1/4),
    # KL = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.13081203594113697
    base = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    signal = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    solution = solve_beta(base, signal, 0.13081203594113697, tolerance=1e-8)
    assert isinstance(solution, BetaSolution)
    assert isinstance(solution.beta, float)
    assert isinstance(solution.kl, float)
    assert solution.beta == pytest.approx(1.0, rel=1e-7)
    assert solution.kl == pytest.approx(0.13081203594113697, rel=1e-8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        solution.beta = 2.0  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("budget", [1e-4, 0.02, 0.05, 0.3])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_solve_beta_spends_the_budget(budget: float, tolerance: float, dtype: torch.dtype) -> None:
    base, signal = some_states(60, 4, padded=2, dtype=dtype)
    solution = solve_beta(base, signal, budget, tolerance=tolerance)
    assert solution.kl == pytest.approx(budget, rel=tolerance)
    measured = reference.mean_tilted_kl(base, signal, solution.beta)
    assert measured == pytest.approx(budget, rel=tolerance * (1 + 1e-6))
    assert measured == pytest.approx(solution.kl, rel=1e-9)


def test_solve_beta_default_tolerance() -> None:
    base, signal = some_states(60, 4)
    assert solve_beta(base, signal, 0.05).kl == pytest.approx(0.05, rel=1e-4)


def test_solve_beta_near_the_most_that_is_reachable() -> None:
    base, signal = some_states(30, 4)
    best = sum(-base[n, signal[n].argmax()].item() for n in range(30)) / 30
    solution = solve_beta(base, signal, 0.99 * best)
    assert reference.mean_tilted_kl(base, signal, solution.beta) == pytest.approx(0.99 * best, rel=1.001e-4)


@pytest.mark.parametrize("chunk", [1, 7, 59, 60, 61])
def test_solve_beta_does_not_depend_on_chunks(chunk: int) -> None:
    base, signal = some_states(60, 4)
    whole = solve_beta(base, signal, 0.05, tolerance=1e-9)
    cut = solve_beta(base, signal, 0.05, tolerance=1e-9, chunk=chunk)
    assert cut.beta == pytest.approx(whole.beta, rel=1e-8)


def test_solve_beta_refuses_no_states() -> None:
    base, signal = some_states(5, 4)
    with pytest.raises(ValueError, match="no states") as raised:
        solve_beta(base[:0], signal[:0], 0.05)
    assert not isinstance(raised.value, UnreachableBudget)


@pytest.mark.parametrize("factor", [0.1, 7.0])
def test_solve_beta_scales_with_the_signal(factor: float) -> None:
    base, signal = some_states(20, 4)
    one = solve_beta(base, signal, 0.05, tolerance=1e-8)
    other = solve_beta(base, factor * signal, 0.05, tolerance=1e-8)
    assert other.beta == pytest.approx(factor * one.beta, rel=1e-6)


@pytest.mark.parametrize("budget", [0.0, -0.1, math.nan, math.inf])
def test_solve_beta_refuses_a_budget_that_is_not_positive(budget: float) -> None:
    base, signal = some_states(5, 4)
    with pytest.raises(ValueError, match="budget") as raised:
        solve_beta(base, signal, budget)
    assert not isinstance(raised.value, UnreachableBudget)


@pytest.mark.parametrize("constant", [0.0, 2.0, "per state", "but for padding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solve_beta_refuses_a_signal_that_says_nothing(constant: float | str, dtype: torch.dtype) -> None:
    base, signal = some_states(8, 4, padded=1, dtype=dtype)
    if isinstance(constant, float):
        signal = torch.full_like(signal, constant)
    else:
        signal = torch.linspace(-3, 3, 8, dtype=dtype)[:, None].expand_as(signal).clone()
        if constant == "but for padding":
            signal[base <= LOG_ZERO] = 0.0
    with pytest.raises(UnreachableBudget):
        solve_beta(base, signal, 0.05)


def test_solve_beta_says_what_is_reachable() -> None:
    base, signal = some_states(30, 4)
    most = sum(-base[n, signal[n].argmax()].item() for n in range(30)) / 30
    with pytest.raises(UnreachableBudget) as raised:
        solve_beta(base, signal, 1.5 * most)
    assert isinstance(raised.value, ValueError)
    numbers = [float(x) for x in re.findall(r"\d+\.?\d*(?:e[+-]?\d+)?", str(raised.value))]
    assert any(number == pytest.approx(most, rel=0.02) for number in numbers), str(raised.value)
