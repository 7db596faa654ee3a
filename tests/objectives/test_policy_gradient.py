"""The clipped policy gradient of stage 2: values, gradients, and where it leads."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from erpd_lightning.objectives import (
    ClippedPolicyGradient,
    TokenObjective,
    exact_kl,
    masked_sum,
    tilt,
)
from support import reference
from support.reference import grad

INF = float("inf")
WIDE: dict[str, Any] = {"epsilon_low": 1.0, "epsilon_high": 1e6, "truncate": 1e6}
"""Neither clip nor truncation."""


def some_tokens(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs of student, pi_old and sampler, a signal of both signs, and a KL."""
    old = -3 * torch.rand(6, 5, dtype=dtype)
    logps = old + 0.5 * torch.randn(6, 5, dtype=dtype)
    sampler = old + 0.8 * torch.randn(6, 5, dtype=dtype)
    return logps, old, sampler, torch.randn(6, 5, dtype=dtype), torch.rand(6, 5, dtype=dtype)


def logs(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("signal", "expected"),
    [
        # ratios .5, 1, 1.5 with clips .8 and 1.2; weights .5, 1.5, 2 (of 4); beta KL = .4 * .5
        (2.0, [-0.5 + 0.2, -3.0 + 0.2, -4.8 + 0.2]),
        (-2.0, [0.8 + 0.2, 3.0 + 0.2, 6.0 + 0.2]),
    ],
)
def test_by_hand(signal: float, expected: list[float]) -> None:
    old, sampler = logs(0.2, 0.3, 0.4), logs(0.4, 0.2, 0.1)
    logps, signals = old + logs(0.5, 1.0, 1.5), torch.full((1, 3), signal).double()
    kl = torch.full((1, 3), 0.5).double()
    losses = ClippedPolicyGradient()(logps, old, sampler, signals, kl, 0.4)
    assert losses[0].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("settings", [(0.2, 0.2, 2.0), (0.1, 0.5, 0.7), (1.0, 0.1, 5.0)])
def test_agrees_with_reference_and_its_gradient(settings: Any, dtype: torch.dtype, tolerance: float) -> None:
    """The weight has no gradient, and neither has a token whose ratio is clipped."""
    tensors = some_tokens(dtype)
    for tensor in tensors:
        tensor.requires_grad_()
    losses = ClippedPolicyGradient(*settings)(*tensors, 0.7)
    expected, gradient = reference.clipped_policy_gradient_loss(*tensors, 0.7, *settings)
    assert losses.shape == (6, 5)
    assert losses.detach().numpy() == pytest.approx(expected, abs=tolerance)
    losses.sum().backward()
    assert (gradient == 0).any()
    assert grad(tensors[0]).numpy() == pytest.approx(gradient, abs=tolerance)
    assert grad(tensors[4]).numpy() == pytest.approx(0.7)
    assert tensors[2].grad is None


def test_gradcheck() -> None:
    logps, old, sampler, signal, kl = some_tokens()
    logps.requires_grad_()
    kl.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: ClippedPolicyGradient()(x, old, sampler, signal, y, 0.3), (logps, kl))


def by_enumeration(logits: Tensor, old: Tensor, sampler: Tensor, base: Tensor, signal: Tensor, beta: float) -> Tensor:
    """The mean loss over all next tokens `(V,)` that the sampler may draw in one state."""
    logp, size = logits.log_softmax(-1), len(logits)
    kl = exact_kl(logp, base).expand(1, size)
    losses = ClippedPolicyGradient(**WIDE)(logp[None], old[None], sampler[None], signal[None], kl, beta)
    return sampler.exp() @ losses[0]


@pytest.mark.parametrize("on_policy", [True, False])
def test_mean_gradient_is_that_of_the_regularised_signal_by_enumeration(on_policy: bool) -> None:
    """Of `-(E_pi[s] - beta KL(pi||base))` over next tokens, whoever drew them, as long as nothing is clipped."""
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    old, sampler, base = torch.randn(3, 6, dtype=torch.float64).log_softmax(-1)
    if on_policy:
        old = sampler = logits.detach().log_softmax(-1)
    signal, beta = torch.randn(6).double(), 0.4
    (found,) = torch.autograd.grad(by_enumeration(logits, old, sampler, base, signal, beta), logits)
    logp = logits.log_softmax(-1)
    objective = logp.exp() @ signal - beta * (logp.exp() * (logp - base)).sum()
    (expected,) = torch.autograd.grad(-objective, logits)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_it_ends_at_the_tilted_base_policy() -> None:
    """Optimised on-policy in one state, pi_old taken again at every step, it ends where the target is."""
    base, signal = torch.randn(5, dtype=torch.float64).log_softmax(-1), torch.randn(5).double()
    logits, beta = base.clone().requires_grad_(), 0.5
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        old = logits.detach().log_softmax(-1)
        by_enumeration(logits, old, old, base, signal, beta).backward()
        optimizer.step()
    torch.testing.assert_close(logits.detach().softmax(-1), tilt(base, signal, beta).exp(), rtol=0, atol=1e-6)


def test_without_a_kl_it_collapses() -> None:
    base, signal = torch.randn(5, dtype=torch.float64).log_softmax(-1), torch.randn(5).double()
    logits = base.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        logp = logits.log_softmax(-1)
        old, none = logp.detach(), torch.zeros(1, 5).double()
        losses = ClippedPolicyGradient(kl_term=False)(logp[None], old[None], old[None], signal[None], none, 0.5)
        (old.exp() @ losses[0]).backward()
        optimizer.step()
    assert float(logits.detach().softmax(-1)[signal.argmax()]) > 0.999


@pytest.mark.parametrize("garbage", [0.0, -1e4, INF])
def test_padding_changes_neither_loss_nor_gradient(garbage: float) -> None:
    tensors = some_tokens()
    mask = torch.rand(6, 5) < 0.6

    def run(logps: Tensor, others: Any, mask: Tensor) -> tuple[Tensor, Tensor]:
        logps = logps.clone().requires_grad_()
        old, sampler, signal, kl = others
        loss = masked_sum(ClippedPolicyGradient()(logps, old, sampler, signal, kl, 0.5), mask)
        loss.backward()
        assert (grad(logps)[~mask] == 0).all()
        return loss, grad(logps)[mask]

    loss, gradient = run(tensors[0], tensors[1:], mask)
    assert (gradient != 0).any()
    # What a batch holds in its padding is 0, except for the student's log-probs here.
    padded = [torch.nn.functional.pad(x.masked_fill(~mask, 0.0), (0, 2)) for x in tensors]
    padded[4] = torch.nn.functional.pad(tensors[4].masked_fill(~mask, garbage), (0, 2), value=garbage)
    again, gradient_again = run(padded[0], padded[1:], torch.nn.functional.pad(mask, (0, 2), value=False))
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient_again, gradient, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tokens", [0, 3])
def test_empty_mask_is_zero_and_runs_backward(tokens: int) -> None:
    logps, old, sampler, signal, kl = (x[:, :tokens] for x in some_tokens())
    logps = logps.clone().requires_grad_()
    losses = ClippedPolicyGradient()(logps, old, sampler, signal, kl, 1.0)
    loss = masked_sum(losses, torch.zeros(6, tokens, dtype=torch.bool))
    assert loss.item() == 0.0
    loss.backward()
    assert torch.equal(grad(logps), torch.zeros_like(logps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sampler", [-1e4, -1.0, 0.0])
@pytest.mark.parametrize("old_logp", [-1e4, -1.0, 0.0])
@pytest.mark.parametrize("logp", [-INF, -1e4, -1.0, 0.0])
def test_extreme_log_probs_stay_finite(logp: float, old_logp: float, sampler: float, dtype: torch.dtype) -> None:
    leaf = torch.full((1, 2), logp, dtype=dtype, requires_grad=True)
    old, drawn = (torch.full((1, 2), value, dtype=dtype) for value in (old_logp, sampler))
    signal = torch.tensor([[3.0, -3.0]], dtype=dtype)
    losses = ClippedPolicyGradient()(leaf, old, drawn, signal, torch.zeros(1, 2, dtype=dtype), 0.5)
    assert torch.isfinite(losses).all()
    losses.sum().backward()
    assert torch.isfinite(grad(leaf)).all()
    assert grad(leaf).norm().isfinite()


def test_defaults() -> None:
    objective = ClippedPolicyGradient()
    assert vars(objective) == {"epsilon_low": 0.2, "epsilon_high": 0.2, "truncate": 2.0, "kl_term": True}
    assert isinstance(objective, TokenObjective)


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan, math.inf])
@pytest.mark.parametrize("name", ["epsilon_low", "epsilon_high", "truncate"])
def test_values_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is"):
        ClippedPolicyGradient(**{name: value})  # type: ignore[arg-type]
