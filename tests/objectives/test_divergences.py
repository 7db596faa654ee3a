import math

import pytest
import reference
import torch
from reference import grad

from erpd_lightning.objectives import entropy, exact_kl

INF = float("inf")


def log(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def random_logps(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.log_softmax(2 * torch.randn(shape, dtype=dtype), -1)


def test_by_hand() -> None:
    p, q = log(1 / 2, 1 / 2), log(1 / 4, 3 / 4)
    # KL(p||q) = ln(2)/2 + ln(2/3)/2 = ln(4/3)/2;  KL(q||p) = ln(1/2)/4 + 3 ln(3/2)/4
    assert exact_kl(p, q).item() == pytest.approx(0.14384103622589045, abs=1e-12)
    assert exact_kl(q, p).item() == pytest.approx(0.13081203594113697, abs=1e-12)
    # H = ln(2)/2 + ln(4)/4 + ln(4)/4 = 1.5 ln 2
    assert entropy(log(1 / 2, 1 / 4, 1 / 4)).item() == pytest.approx(1.0397207708399179, abs=1e-12)


@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 3, 6)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_agrees_with_reference(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    p, q = random_logps(*shape, dtype=dtype), random_logps(*shape, dtype=dtype)
    assert exact_kl(p, q).shape == entropy(p).shape == shape[:-1]
    assert exact_kl(p, q).numpy() == pytest.approx(reference.kl(p, q), abs=tolerance)
    assert entropy(p).numpy() == pytest.approx(reference.entropy(p), abs=tolerance)


def test_kl_is_the_expectation_over_every_outcome_of_two_tokens() -> None:
    """The chain rule: KL of the joint = KL of the first + E_p[KL of the second]."""
    first_p, first_q = random_logps(3), random_logps(3)
    second_p, second_q = random_logps(3, 4), random_logps(3, 4)
    joint = 0.0
    for a in range(3):
        for b in range(4):
            log_p = (first_p[a] + second_p[a, b]).item()
            log_q = (first_q[a] + second_q[a, b]).item()
            joint += math.exp(log_p) * (log_p - log_q)
    chained = exact_kl(first_p, first_q) + first_p.exp() @ exact_kl(second_p, second_q)
    assert chained.item() == pytest.approx(joint, abs=1e-12)


def test_gradients() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    other = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def divergence(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return exact_kl(torch.log_softmax(a, -1), torch.log_softmax(b, -1))

    assert torch.autograd.gradcheck(divergence, (logits, other))
    assert torch.autograd.gradcheck(lambda a: entropy(torch.log_softmax(a, -1)), logits)

    by_p, by_q = torch.autograd.grad(divergence(logits, other).sum(), (logits, other))
    logq = torch.log_softmax(other, -1)
    assert by_p.numpy() == pytest.approx(reference.kl_logit_gradient(logits, logq), abs=1e-9)
    # d KL(p||q) / d logits of q = q - p
    torch.testing.assert_close(by_q, logq.exp() - torch.log_softmax(logits, -1).exp())


@pytest.mark.parametrize(
    ("logp", "logq", "expected"),
    [
        ([0.0, -INF], [math.log(0.5), math.log(0.5)], math.log(2)),
        ([0.0, -INF], [0.0, -INF], 0.0),
        ([math.log(0.5), math.log(0.5), -INF], [math.log(0.25), math.log(0.75), -INF], 0.143841036),
        ([-INF, 0.0], [-1e4, 0.0], 0.0),
    ],
)
def test_zero_probability_contributes_nothing(
    logp: list[float], logq: list[float], expected: float
) -> None:
    p = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    q = torch.tensor(logq, dtype=torch.float64, requires_grad=True)
    result = exact_kl(p, q)
    assert result.item() == pytest.approx(expected, abs=1e-8)
    result.backward()
    assert torch.isfinite(grad(p)).all()
    assert torch.isfinite(grad(q)).all()
    assert (grad(p)[p == -INF] == 0).all()
    assert (grad(q)[p == -INF] == 0).all()


def test_entropy_of_certainty_is_zero_with_a_finite_gradient() -> None:
    logp = torch.tensor([[0.0, -INF], [-INF, 0.0]], requires_grad=True)
    result = entropy(logp)
    assert result.tolist() == [0.0, 0.0]
    result.sum().backward()
    assert torch.isfinite(grad(logp)).all()
    assert (grad(logp)[logp == -INF] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("logits", "other", "expected"),
    [
        ([1e4, 0.0, -1e4], [0.0, 0.0, 0.0], math.log(3)),
        ([1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], 2e4),
        ([0.0, -INF, 0.0], [0.0, 0.0, 0.0], math.log(3 / 2)),
    ],
)
def test_extreme_logits_stay_finite(
    logits: list[float], other: list[float], expected: float, dtype: torch.dtype
) -> None:
    a = torch.tensor(logits, dtype=dtype, requires_grad=True)
    b = torch.tensor(other, dtype=dtype, requires_grad=True)
    logp = torch.log_softmax(a, -1)
    result = exact_kl(logp, torch.log_softmax(b, -1))
    assert result.item() == pytest.approx(expected, rel=1e-6)
    (result + entropy(logp)).backward()
    assert torch.isfinite(grad(a)).all()
    assert torch.isfinite(grad(b)).all()


@pytest.mark.parametrize("log_zero", [-INF, -100.0])
def test_padding_the_vocabulary_changes_nothing(log_zero: float) -> None:
    p, q = random_logps(3, 5), random_logps(3, 5)
    padded = [torch.nn.functional.pad(x, (0, 2), value=log_zero) for x in (p, q)]
    torch.testing.assert_close(exact_kl(*padded), exact_kl(p, q), rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy(padded[0]), entropy(p), rtol=0, atol=1e-12)
