import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from erpd_lightning.objectives import check_kl_loss, entropy, exact_kl, kl_loss, kl_value
from support import reference
from support.reference import grad

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
def test_agrees_with_reference(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
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
def test_zero_probability_contributes_nothing(logp: list[float], logq: list[float], expected: float) -> None:
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


# --- estimators from samples ----------------------------------------------------------------

LOSSES: list[Any] = [("reverse", "k2"), ("forward", "k1"), ("forward", "k3")]
INVALID: list[Any] = [("reverse", "k1"), ("reverse", "k3"), ("forward", "k2")]
END, LENGTH, ENTRIES = 0, 3, 3


class Tree:
    """A policy over all responses of at most `LENGTH` tokens: logits for each beginning. `END` ends a response."""

    def __init__(self) -> None:
        beginnings = [b for n in range(LENGTH) for b in itertools.product(range(1, ENTRIES), repeat=n)]
        self.row = {beginning: number for number, beginning in enumerate(beginnings)}
        self.logits = torch.randn(len(beginnings), ENTRIES, dtype=torch.float64, requires_grad=True)

    def logps(self) -> tuple[Tensor, Tensor]:
        """Log-probs of the tokens of every response there is, `(responses, LENGTH)`, and the mask."""
        table, rows = self.logits.log_softmax(-1), []
        for response in responses():
            tokens = [table[self.row[response[:t]], token] for t, token in enumerate(response)]
            rows.append(torch.stack([*tokens, *[torch.zeros(()).double()] * (LENGTH - len(tokens))]))
        lengths = torch.tensor([len(response) for response in responses()])
        return torch.stack(rows), torch.arange(LENGTH) < lengths[:, None]


def responses() -> list[tuple[int, ...]]:
    ended = [(*b, END) for n in range(LENGTH) for b in itertools.product(range(1, ENTRIES), repeat=n)]
    return [*ended, *itertools.product(range(1, ENTRIES), repeat=LENGTH)]


def pick(direction: str, policy: Any, other: Any) -> tuple[Any, Any]:
    """p and q of `KL(p || q)`."""
    return (policy, other) if direction == "reverse" else (other, policy)


def test_estimators_by_hand() -> None:
    # p/q = 2: ln 2, ln(2)^2 / 2, 1/2 - 1 + ln 2; with p/sampler = 3 three times that, cut at 1.5 half of that
    logp, logq, sampler = log(0.6), log(0.3), log(0.2)
    expected = {"k1": math.log(2), "k2": math.log(2) ** 2 / 2, "k3": math.log(2) - 0.5}
    estimators: list[Any] = list(expected)
    for name in estimators:
        assert kl_value(logp, logq, name).item() == pytest.approx(expected[name], abs=1e-12)
        weighted = kl_value(logp, logq, name, sampler_logps=sampler)
        assert weighted.item() == pytest.approx(3 * expected[name], abs=1e-12)
        cut = kl_value(logp, logq, name, sampler_logps=sampler, truncate=1.5)
        assert cut.item() == pytest.approx(1.5 * expected[name], abs=1e-12)
        assert not kl_value(logp.requires_grad_(), logq, name).requires_grad


def test_k3_of_policies_that_hardly_differ_keeps_its_digits() -> None:
    logp = torch.tensor([-1.0], dtype=torch.float32)
    logq = logp - 2.0**-12
    # l^2 / 2 - l^3 / 6
    assert kl_value(logp, logq, "k3").item() == pytest.approx(2.0**-25 - 2.0**-36 / 6, rel=1e-3)


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_mean_of_the_estimates_is_the_kl_of_tokens(direction: str, off_policy: bool) -> None:
    policy, other, third = random_logps(6, 5), random_logps(6, 5), random_logps(6, 5)
    p, q = pick(direction, policy, other)
    sampler = third if off_policy else p
    estimators: list[Any] = ["k1", "k2", "k3"]
    means = [
        (sampler.exp() * kl_value(p, q, name, sampler_logps=sampler if off_policy else None)).sum(-1)
        for name in estimators
    ]
    exact = reference.kl(p, q)
    assert means[0].numpy() == pytest.approx(exact, abs=1e-12)
    assert means[2].numpy() == pytest.approx(exact, abs=1e-12)
    assert means[1].numpy() == pytest.approx((p.exp() * (p - q) ** 2).sum(-1).numpy() / 2, abs=1e-12)


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize(("direction", "estimator"), LOSSES)
def test_the_gradient_of_a_loss_is_that_of_the_kl_of_tokens(direction: Any, estimator: Any, off_policy: bool) -> None:
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    other, third = random_logps(6, 5), random_logps(6, 5)
    policy = logits.log_softmax(-1)
    p, q = pick(direction, policy, other)
    sampler = third if off_policy else p.detach()
    losses = kl_loss(
        policy, other, direction=direction, estimator=estimator, sampler_logps=sampler if off_policy else None
    )
    (gradient,) = torch.autograd.grad((sampler.exp() * losses).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((p.exp() * (p - q)).sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize(("direction", "estimator"), [*LOSSES, *INVALID])
def test_values_and_gradients_of_the_kl_of_responses(direction: Any, estimator: Any, off_policy: bool) -> None:
    """Over every response there is: log-probs summed over a response are those of the response."""
    policy, other, third = Tree(), Tree(), Tree()
    logps, mask = (x.where(policy.logps()[1], 0.0).sum(-1) for x in policy.logps())
    assert mask.max() == LENGTH
    fixed, sampled = (tree.logps()[0].detach().sum(-1) for tree in (other, third))
    assert logps.exp().sum().item() == pytest.approx(1.0)
    p, q = pick(direction, logps, fixed)
    exact = (p.exp() * (p - q)).sum()
    sampler = sampled if off_policy else p.detach()
    settings: dict[str, Any] = {"sampler_logps": sampled if off_policy else None}
    if estimator != "k2":
        mean = (sampler.exp() * kl_value(p, q, estimator, **settings)).sum()
        assert mean.item() == pytest.approx(exact.item(), abs=1e-12)
    (expected,) = torch.autograd.grad(exact, policy.logits, retain_graph=True)
    if (direction, estimator) in LOSSES:
        losses = kl_loss(logps, fixed, direction=direction, estimator=estimator, **settings)
        (gradient,) = torch.autograd.grad((sampler.exp() * losses).sum(), policy.logits)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
        return

    # What the refused ones would do, written out.
    ratio = p - q
    estimate = {"k1": ratio, "k2": ratio**2 / 2, "k3": (-ratio).exp() - 1 + ratio}[estimator]
    (gradient,) = torch.autograd.grad((p.detach().exp() * estimate).sum(), policy.logits, retain_graph=True)
    (opposite,) = torch.autograd.grad((q.exp() * (q - p)).sum(), policy.logits)
    assert (gradient - expected).norm() > 0.1 * expected.norm()
    if (direction, estimator) == ("reverse", "k1"):
        assert gradient.abs().max() < 1e-12
    elif (direction, estimator) == ("reverse", "k3"):
        torch.testing.assert_close(gradient, opposite, rtol=0, atol=1e-12)
    else:
        assert (gradient - opposite).norm() > 0.1 * opposite.norm()


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_estimates_of_tokens_add_up_to_the_kl_of_responses(direction: str, off_policy: bool) -> None:
    """The chain rule; off policy a token's weight is that of the response up to it."""
    trees = [Tree() for _ in range(3)]
    (policy, mask), (other, _), (third, _) = [tree.logps() for tree in trees]
    p, q = pick(direction, policy.detach(), other.detach())
    exact = (p.sum(-1).exp() * (p - q).sum(-1)).sum()
    sampler = third.detach() if off_policy else p
    before = (p - sampler).cumsum(-1) - (p - sampler)
    for name in ("k1", "k3"):
        tokens = kl_value(p, q, name, sampler_logps=sampler)
        sums = (before.exp() * tokens).where(mask, 0.0).sum(-1)
        assert (sampler.sum(-1).exp() * sums).sum().item() == pytest.approx(exact.item(), abs=1e-12)


def test_the_weight_of_a_loss_is_cut_and_carries_no_gradient() -> None:
    logps, other, sampler = log(0.6, 0.2).requires_grad_(), log(0.3, 0.1), log(0.2, 0.4)
    kl_loss(logps, other, direction="reverse", estimator="k2", sampler_logps=sampler, truncate=2.0).sum().backward()
    # weights min(3, 2) and 1/2, times the log-ratio
    assert grad(logps).tolist() == pytest.approx([2 * math.log(2), math.log(2) / 2], abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("direction", "estimator"), LOSSES)
@pytest.mark.parametrize(("one", "two"), [(0.0, -INF), (-INF, 0.0), (-1e4, 1e4), (0.0, -90.0), (-90.0, 0.0)])
@pytest.mark.parametrize("sampled", [0.0, -INF, None, "two"])
def test_losses_of_infinite_log_ratios_stay_finite(
    direction: Any, estimator: Any, one: float, two: float, sampled: Any, dtype: torch.dtype
) -> None:
    logps, other = torch.tensor([one, -1.0], dtype=dtype, requires_grad=True), torch.tensor([two, -2.0], dtype=dtype)
    if sampled is None:
        sampler = None
    elif sampled == "two" or -INF in (one, two):
        sampler = torch.tensor([-3.0, -2.0], dtype=dtype)
    else:
        sampler = torch.tensor([sampled, -2.0], dtype=dtype)
    losses = kl_loss(logps, other, direction=direction, estimator=estimator, sampler_logps=sampler)
    losses.sum().backward()
    values = kl_value(*pick(direction, logps, other), estimator, sampler_logps=sampler)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(values).all()
    assert torch.isfinite(grad(logps)).all()
    assert torch.isfinite(grad(logps).norm())


@pytest.mark.parametrize("garbage", [1e4, -INF, float("nan")])
@pytest.mark.parametrize(("direction", "estimator"), LOSSES)
def test_what_is_masked_out_of_a_loss_leaves_no_trace(direction: Any, estimator: Any, garbage: float) -> None:
    logps, other = torch.tensor([-1.0, garbage], requires_grad=True), torch.tensor([-2.0, 0.0])
    losses = kl_loss(logps, other, direction=direction, estimator=estimator, sampler_logps=other)
    torch.where(torch.tensor([True, False]), losses, 0.0).sum().backward()
    assert grad(logps)[0] != 0
    assert grad(logps)[1] == 0


@pytest.mark.parametrize(("direction", "estimator"), INVALID)
def test_a_loss_of_another_gradient_is_refused(direction: Any, estimator: Any) -> None:
    with pytest.raises(ValueError, match=f"{estimator} is no loss for the {direction} KL: its gradient is"):
        kl_loss(log(0.5), log(0.5), direction=direction, estimator=estimator)
    check_kl_loss(direction, "exact")


def test_names_and_bounds_that_are_none() -> None:
    with pytest.raises(ValueError, match="direction is 'sideways'"):
        check_kl_loss("sideways", "k1")
    with pytest.raises(ValueError, match="estimator is 'k4'"):
        check_kl_loss("forward", "k4")
    with pytest.raises(ValueError, match="truncate is 0"):
        kl_value(log(0.5), log(0.5), "k1", sampler_logps=log(0.5), truncate=0)
