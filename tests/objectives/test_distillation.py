import math

import pytest
import torch
from torch import Tensor

from erpd_lightning.objectives import SupportObjective, TiltedTarget, exact_kl, masked_sum
from erpd_lightning.objectives.tilted_policy import LOG_ZERO
from support import reference
from support.reference import grad

INF = float("inf")


def random_logps(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.log_softmax(2 * torch.randn(shape, dtype=dtype), -1)


def some_states(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Student, base and signal of two responses of three tokens over four kept and the tail."""
    signal = (2 * torch.randn(2, 3, 5, dtype=dtype)).clamp(-3, 3)
    return random_logps(2, 3, 5, dtype=dtype), random_logps(2, 3, 5, dtype=dtype), signal


def test_by_hand() -> None:
    student = torch.tensor([[[0.5, 0.5]]], dtype=torch.float64).log()
    target = torch.tensor([[[0.25, 0.75]]], dtype=torch.float64).log()
    # student first: ln(2)/2 + ln(2/3)/2 = ln(4/3)/2 (the other direction is 0.1308)
    assert exact_kl(student, target).tolist() == [[pytest.approx(0.14384103622589045)]]
    # base (1/2, 1/2) with s = (0, ln 3), beta 1, is that target
    signal = torch.tensor([[[0.0, math.log(3.0)]]], dtype=torch.float64)
    losses = TiltedTarget()(student, student, signal, 1.0)
    assert losses.tolist() == [[pytest.approx(0.14384103622589045)]]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
def test_agrees_with_reference(beta: float, dtype: torch.dtype, tolerance: float) -> None:
    student, base, signal = some_states(dtype)
    target = random_logps(2, 3, 5, dtype=dtype)
    assert exact_kl(student, target).shape == (2, 3)
    assert exact_kl(student, target).numpy() == pytest.approx(reference.kl(student, target), abs=tolerance)
    objective = TiltedTarget()
    assert isinstance(objective, SupportObjective)
    assert objective(student, base, signal, beta).numpy() == pytest.approx(
        reference.kl(student, reference.tilt(base, signal, beta)), rel=tolerance, abs=tolerance
    )


def test_gradient_through_the_logits() -> None:
    """`pi (log pi - log pi* - KL)`: no stop-gradient, no missing summand."""
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    _, base, signal = some_states()

    def loss(logits: Tensor) -> Tensor:
        return TiltedTarget()(torch.log_softmax(logits, -1), base, signal, 0.7)

    assert torch.autograd.gradcheck(loss, logits)
    (gradient,) = torch.autograd.grad(loss(logits).sum(), logits)
    expected = reference.kl_logit_gradient(logits, reference.tilt(base, signal, 0.7))
    assert gradient.numpy() == pytest.approx(expected, abs=1e-9)


def test_the_target_is_the_minimum() -> None:
    _, base, signal = some_states()
    logits = torch.tensor(reference.tilt(base, signal, 0.7), requires_grad=True)
    losses = TiltedTarget()(torch.log_softmax(logits, -1), base, signal, 0.7)
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.zeros(2, 3).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(grad(logits), torch.zeros(2, 3, 5).double(), rtol=0, atol=1e-10)


def test_expected_gradient_is_that_of_the_regularised_signal() -> None:
    """`beta KL(pi||pi*) = const - (E_pi[s] - beta KL(pi||base))`: same gradient up to -beta."""
    logits = torch.randn(4, dtype=torch.float64, requires_grad=True)
    base, signal, beta = random_logps(4), torch.randn(4).double(), 0.4
    logp = torch.log_softmax(logits, -1)
    (gradient,) = torch.autograd.grad(TiltedTarget()(logp, base, signal, beta), logits)
    logp = torch.log_softmax(logits, -1)
    regularised = (logp.exp() * (signal - beta * (logp - base))).sum()
    (expected,) = torch.autograd.grad(regularised, logits)
    torch.testing.assert_close(beta * gradient, -expected, rtol=0, atol=1e-10)


def test_padding_the_support_changes_neither_loss_nor_gradient() -> None:
    student, base, signal = some_states()

    def pad(x: Tensor, value: float) -> Tensor:
        empty = torch.full((2, 3, 2), value, dtype=x.dtype)
        return torch.cat([x[..., :-1], empty, x[..., -1:]], -1)

    plain, wide = student.clone().requires_grad_(), pad(student, LOG_ZERO).requires_grad_()
    losses = TiltedTarget()(plain, base, signal, 0.5)
    padded = TiltedTarget()(wide, pad(base, LOG_ZERO), pad(signal, 0.0), 0.5)
    torch.testing.assert_close(padded, losses, rtol=1e-12, atol=1e-12)
    losses.sum().backward()
    padded.sum().backward()
    real = [0, 1, 2, 3, 6]
    torch.testing.assert_close(grad(wide)[..., real], grad(plain), rtol=1e-12, atol=1e-12)
    assert grad(wide)[..., 4:6].abs().max().item() < 1e-30


@pytest.mark.parametrize("garbage", [LOG_ZERO, 0.0, -1e4])
def test_padding_tokens_change_neither_loss_nor_gradient(garbage: float) -> None:
    student, base, signal = some_states()
    mask = torch.tensor([[True, True, True], [True, False, False]])

    def run(student: Tensor, base: Tensor, signal: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        student = student.clone().requires_grad_()
        loss = masked_sum(TiltedTarget()(student, base, signal, 0.5), mask)
        loss.backward()
        assert (grad(student)[~mask] == 0).all()
        return loss, grad(student)[mask]

    loss, gradient = run(student, base, signal, mask)
    assert (gradient != 0).any()
    blank = ~mask[..., None]
    pad = torch.nn.functional.pad
    padded_loss, padded_gradient = run(
        pad(student.masked_fill(blank, garbage), (0, 0, 0, 2), value=garbage),
        pad(base.masked_fill(blank, LOG_ZERO), (0, 0, 0, 2), value=LOG_ZERO),
        pad(signal.masked_fill(blank, 0.0), (0, 0, 0, 2), value=0.0),
        pad(mask, (0, 2), value=False),
    )
    torch.testing.assert_close(padded_loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(padded_gradient, gradient, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tokens", [0, 3])
def test_empty_mask_is_zero_and_runs_backward(tokens: int) -> None:
    student = random_logps(2, tokens, 4).requires_grad_()
    base, signal = random_logps(2, tokens, 4), torch.zeros(2, tokens, 4).double()
    mask = torch.zeros(2, tokens, dtype=torch.bool)
    loss = masked_sum(TiltedTarget()(student, base, signal, 1.0), mask)
    assert loss.item() == 0.0
    loss.backward()
    assert torch.equal(grad(student), torch.zeros_like(student))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logits", [[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 0.0, -INF], [-INF, 0.0, -INF]])
def test_extreme_student_stays_finite(logits: list[float], dtype: torch.dtype) -> None:
    leaf = torch.tensor([[logits]], dtype=dtype, requires_grad=True)
    base = torch.tensor([[[0.2, 0.3, 0.5]]], dtype=dtype).log()
    signal = torch.tensor([[[-3.0, 3.0, 0.0]]], dtype=dtype)
    losses = TiltedTarget()(torch.log_softmax(leaf, -1), base, signal, 0.1)
    assert torch.isfinite(losses).all()
    losses.sum().backward()
    assert torch.isfinite(grad(leaf)).all()


def test_extreme_target_stays_finite() -> None:
    student = random_logps(1, 1, 3, dtype=torch.float32).requires_grad_()
    target = torch.log_softmax(torch.tensor([[[1e4, -1e4, 0.0]]]), -1)
    losses = exact_kl(student, target)
    assert losses.item() == pytest.approx(reference.kl(student, target).item(), rel=1e-6)
    assert losses.item() > 100
    losses.sum().backward()
    assert torch.isfinite(grad(student)).all()


def test_the_objective_is_abstract() -> None:
    with pytest.raises(TypeError):
        SupportObjective()  # type: ignore[abstract]
