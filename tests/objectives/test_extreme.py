import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from erpd_lightning.objectives import (
    CISPO,
    GSPO,
    SAPO,
    CrossEntropy,
    ExtremeObjective,
    PPOClip,
    SquaredError,
    cross_entropy_terms,
    flip,
    masked_mean,
    masked_sum,
    sapo_terms,
)
from support import reference
from support.reference import grad

Reduce = Callable[[Tensor, Tensor], Tensor]
INF = float("inf")
EVERYWHERE = torch.ones(5, 4, dtype=torch.bool)

OBJECTIVES = [
    SAPO(),
    CrossEntropy(),
    PPOClip(),
    PPOClip(0.2, 0.28, dual_clip=3.0),
    GSPO(0.2, 0.3),
    CISPO(),
    SquaredError("sequence"),
    SquaredError("token"),
    SquaredError("sequence", reference=None),
    SquaredError("token", reference=None),
]
every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{type(o).__name__}-{o.per}")


def some_batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, anchors and advantages of both signs and zero; log-ratios in about +-3."""
    anchor = -3 * torch.rand(5, 4, dtype=dtype)
    logps = anchor + 1.2 * torch.randn(5, 4, dtype=dtype)
    return logps, anchor, torch.tensor([1.5, -0.5, 0.0, -2.0, 0.3], dtype=dtype)


def test_sapo_by_hand() -> None:
    logps = torch.tensor([[0.0, math.log(2.0)], [0.0, math.log(2.0)]], dtype=torch.float64)
    result = sapo_terms(logps, torch.zeros_like(logps), torch.tensor([1.0, -1.0]).double())
    # A = +1, tau = 1:    r = 1: -4 s(0) = -2;                 r = 2: -4 s(1) = -4 * 0.7310585786
    # A = -1, tau = 1.05: r = 1: (4/1.05) / 2 = 1.9047619048;  r = 2: (4/1.05) s(1.05)
    #                     s(1.05) = 1 / (1 + 0.3499377491) = 0.7407748992
    expected = [-2.0, -2.9242343145, 1.9047619048, 2.8219996159]
    assert result.flatten().tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("taus", [(1.0, 1.05), (0.5, 2.0), (3.0, 0.7)])
def test_sapo_agrees_with_reference(taus: tuple[float, float], dtype: torch.dtype, tolerance: float) -> None:
    batch = some_batch(dtype)
    result = sapo_terms(*batch, tau_positive=taus[0], tau_negative=taus[1])
    assert result.dtype == dtype
    assert result.numpy() == pytest.approx(reference.sapo_terms(*batch, *taus), abs=tolerance)
    default = sapo_terms(*batch)
    assert default.numpy() == pytest.approx(reference.sapo_terms(*batch), abs=tolerance)


@pytest.mark.parametrize("taus", [(1.0, 1.05), (0.5, 2.0)])
def test_sapo_gradient(taus: tuple[float, float]) -> None:
    logps, anchor, advantages = some_batch()
    logps.requires_grad_()

    def terms(logps: Tensor) -> Tensor:
        return sapo_terms(logps, anchor, advantages, tau_positive=taus[0], tau_negative=taus[1])

    assert torch.autograd.gradcheck(terms, logps)
    (gradient,) = torch.autograd.grad(terms(logps).sum(), logps)
    expected = reference.sapo_gradient(logps, anchor, advantages, *taus)
    assert gradient.numpy() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("log_ratio", [-12.0, -9.0, -5.0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_sapo_guards_leave_ordinary_ratios_alone(log_ratio: float, advantage: float) -> None:
    logps = torch.tensor([[log_ratio]], dtype=torch.float64, requires_grad=True)
    anchor, advantages = torch.zeros(1, 1).double(), torch.tensor([advantage]).double()
    sapo_terms(logps, anchor, advantages).sum().backward()
    expected = reference.sapo_gradient(logps, anchor, advantages).item()
    assert expected != 0
    assert grad(logps).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("taus", [(1.0, 1.05), (0.2, 5.0)])
def test_sapo_at_the_anchor_is_the_policy_gradient(taus: tuple[float, float]) -> None:
    """At r = 1 the slope is 4/tau * 1/4 * tau * A: the temperature cancels and -A is left."""
    anchor = -torch.rand(3, 4, dtype=torch.float64)
    logps = anchor.clone().requires_grad_()
    advantages = torch.tensor([1.5, -0.5, 0.0], dtype=torch.float64)
    terms = sapo_terms(logps, anchor, advantages, tau_positive=taus[0], tau_negative=taus[1])
    terms.sum().backward()
    torch.testing.assert_close(grad(logps), -advantages[:, None].expand(3, 4))


def test_sapo_at_the_anchor_ascends_the_expected_reward_by_enumeration() -> None:
    """Summed over all outcomes with their probability: the gradient of -E[A], exactly."""
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(5, dtype=torch.float64)
    logp = torch.log_softmax(logits, -1)
    terms = sapo_terms(logp[:, None], logp.detach()[:, None], advantages)
    (gradient,) = torch.autograd.grad((logp.detach().exp() * terms[:, 0]).sum(), logits)
    probability = torch.softmax(logits, -1)
    (expected,) = torch.autograd.grad(-(probability * advantages).sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize(
    ("logp", "anchor", "gate"),
    [
        (0.0, -1e4, 1.0),  # the ratio overflows: the gate is open
        (0.0, -INF, 1.0),
        (1e4, -1e4, 1.0),
        (0.0, -89.0, 1.0),  # exp(89) overflows float32 alone
        (0.0, -710.0, 1.0),
        (-1e4, 0.0, None),  # the ratio vanishes: sigmoid(-tau)
        (-INF, 0.0, None),
    ],
)
def test_sapo_extreme_ratios(
    logp: float, anchor: float, gate: float | None, advantage: float, dtype: torch.dtype
) -> None:
    tau = 1.0 if advantage > 0 else 1.05
    logps = torch.tensor([[logp]], dtype=dtype, requires_grad=True)
    terms = sapo_terms(logps, torch.tensor([[anchor]], dtype=dtype), torch.tensor([advantage], dtype=dtype))
    gate = reference.sigmoid(-tau) if gate is None else gate
    assert terms.item() == pytest.approx(-(4 / tau) * gate * advantage, rel=1e-6)
    terms.sum().backward()
    assert abs(grad(logps).item()) < 1e-6  # false for NaN too


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sapo_terms_have_the_type_of_the_log_probs(dtype: torch.dtype) -> None:
    other = torch.float32 if dtype == torch.float64 else torch.float64
    logps, anchor, advantages = some_batch(dtype)
    assert sapo_terms(logps, anchor, advantages.to(other)).dtype == dtype


def test_cross_entropy_terms() -> None:
    logps = torch.tensor([[-0.25, -2.0]], requires_grad=True)
    result = cross_entropy_terms(logps)
    assert result.tolist() == [[0.25, 2.0]]
    result.sum().backward()
    assert grad(logps).tolist() == [[-1.0, -1.0]]


def test_sapo_class_is_the_function() -> None:
    logps, anchor, advantages = some_batch()
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]).double()
    for objective, taus in [(SAPO(), (1.0, 1.05)), (SAPO(0.5, 2.0), (0.5, 2.0))]:
        assert isinstance(objective, ExtremeObjective)
        result = objective(logps, anchor, EVERYWHERE, rewards, advantages)
        expected = reference.sapo_terms(logps, anchor, advantages, *taus)
        assert result.numpy() == pytest.approx(expected, abs=1e-12)


def test_sapo_class_selects_responses_with_an_advantage() -> None:
    advantages = torch.tensor([1.5, 0.0, -0.5, 0.0])
    selected = SAPO().select(torch.tensor([1.0, 1.0, 0.0, 0.0]), advantages)
    assert selected.dtype == torch.bool
    assert selected.tolist() == [True, False, True, False]


@pytest.mark.parametrize("tau", [0.0, -1.0])
def test_sapo_class_refuses_a_temperature_that_is_not_positive(tau: float) -> None:
    with pytest.raises(ValueError, match="tau_positive"):
        SAPO(tau_positive=tau)
    with pytest.raises(ValueError, match="tau_negative"):
        SAPO(tau_negative=tau)


def test_cross_entropy_class() -> None:
    objective = CrossEntropy()
    assert isinstance(objective, ExtremeObjective)
    rewards, advantages = torch.tensor([1.0, 0.0, 0.5, 1.0]), torch.tensor([0.0, -1.0, 1.0, 2.0])
    selected = objective.select(rewards, advantages)
    assert selected.dtype == torch.bool
    assert selected.tolist() == [True, False, False, True]

    logps = torch.tensor([[-1.0, -2.0], [-3.0, -INF], [-4.0, -5.0], [-0.5, -1e4]])
    logps.requires_grad_()
    terms = objective(logps, torch.zeros(4, 2), torch.ones(4, 2).bool(), rewards, advantages)
    assert terms.tolist() == [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [0.5, 1e4]]
    terms.sum().backward()
    assert grad(logps).tolist() == [[-1.0, -1.0], [0.0, 0.0], [0.0, 0.0], [-1.0, -1.0]]


def test_cross_entropy_gradcheck() -> None:
    logps, anchor, advantages = some_batch()
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]).double()
    logps.requires_grad_()
    objective = CrossEntropy()
    assert torch.autograd.gradcheck(lambda x: objective(x, anchor, EVERYWHERE, rewards, advantages), logps)


def test_flip_turns_right_into_wrong() -> None:
    rewards, advantages = torch.tensor([1.0, 0.0, 0.25]), torch.tensor([1.5, -0.5, 0.0])
    flipped_rewards, flipped_advantages = flip(rewards, advantages)
    assert flipped_rewards.tolist() == [0.0, 1.0, 0.75]
    assert flipped_advantages.tolist() == [-1.5, 0.5, 0.0]
    assert CrossEntropy().select(flipped_rewards, flipped_advantages).tolist() == [
        False,
        True,
        False,
    ]
    assert rewards.tolist() == [1.0, 0.0, 0.25]  # not in place
    assert advantages.tolist() == [1.5, -0.5, 0.0]


def test_flipped_sapo_descends_where_sapo_ascends() -> None:
    """Flipping also exchanges the temperatures: the term of -A, not minus the term of A."""
    logps, anchor, advantages = some_batch()
    rewards = torch.zeros(5).double()
    flipped = SAPO()(logps, anchor, EVERYWHERE, *flip(rewards, advantages))
    assert flipped.numpy() == pytest.approx(reference.sapo_terms(logps, anchor, -advantages), abs=1e-12)


def test_the_objective_is_abstract_in_both_methods() -> None:
    assert ExtremeObjective.__abstractmethods__ == {"select", "__call__"}
    with pytest.raises(TypeError):
        ExtremeObjective()  # type: ignore[abstract]


def test_only_what_lives_on_advantages_needs_groups() -> None:
    alone = [type(objective) for objective in OBJECTIVES if not objective.needs_groups]
    assert alone == [CrossEntropy]


def own_mask(objective: ExtremeObjective, mask: Tensor) -> Tensor:
    """What the sum over an objective's terms takes in."""
    return mask if objective.per == "token" else mask.any(-1)


@every_objective
@pytest.mark.parametrize("reduce", [masked_sum, masked_mean])
@pytest.mark.parametrize("garbage", [0.0, 1e4, -1e4, -INF, float("nan")])
def test_padding_changes_neither_loss_nor_gradient(objective: ExtremeObjective, reduce: Reduce, garbage: float) -> None:
    logps, anchor, advantages = some_batch()
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]).double()
    mask = torch.arange(4) < torch.tensor([[4], [1], [2], [3], [0]])

    def run(logps: Tensor, anchor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        logps = logps.clone().requires_grad_()
        terms = objective(logps, anchor, mask, rewards, advantages)
        loss = reduce(terms, own_mask(objective, mask))
        loss.backward()
        assert (grad(logps)[~mask] == 0).all()
        return loss, grad(logps)[:, :4][mask[:, :4]]

    loss, gradient = run(logps, anchor, mask)
    dirty = torch.nn.functional.pad(logps.masked_fill(~mask, garbage), (0, 3), value=garbage)
    wide = torch.nn.functional.pad(mask, (0, 3), value=False)
    padded_loss, padded_gradient = run(dirty, torch.nn.functional.pad(anchor, (0, 3)), wide)
    assert (gradient != 0).any()
    torch.testing.assert_close(padded_loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(padded_gradient, gradient, rtol=1e-12, atol=0)


@every_objective
@pytest.mark.parametrize("responses", [0, 2])
def test_empty_mask_is_zero_and_runs_backward(objective: ExtremeObjective, responses: int) -> None:
    logps = torch.randn(responses, 3, requires_grad=True)
    mask, ones = torch.zeros(responses, 3, dtype=torch.bool), torch.ones(responses)
    terms = objective(logps, torch.zeros(responses, 3), mask, ones, ones)
    assert terms.shape == own_mask(objective, mask).shape
    loss = masked_mean(terms, own_mask(objective, mask))
    assert loss.item() == 0.0
    loss.backward()
    assert torch.equal(grad(logps), torch.zeros(responses, 3))


@every_objective
def test_terms_are_per_token_or_per_response(objective: ExtremeObjective) -> None:
    logps, anchor, advantages = some_batch()
    terms = objective(logps, anchor, EVERYWHERE, torch.ones(5).double(), advantages)
    assert terms.shape == ((5, 4) if objective.per == "token" else (5,))
    assert terms.dtype == torch.float64


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o.needs_groups], ids=lambda o: type(o).__name__)
def test_what_lives_on_advantages_is_the_objective_of_the_negative_advantage_when_flipped(
    objective: ExtremeObjective,
) -> None:
    """At the anchor, one step of the unlearned policy undoes one of the teacher."""
    _, anchor, advantages = some_batch()
    selected = objective.select(torch.ones(5), torch.tensor([1.5, 0.0, -0.5, 0.0, 2.0]))
    assert selected.tolist() == [True, False, True, False, True]
    gradients = []
    for outcomes in [(torch.ones(5), advantages), flip(torch.ones(5), advantages)]:
        logps = anchor.clone().requires_grad_()
        objective(logps, anchor, EVERYWHERE, *outcomes).sum().backward()
        gradients.append(grad(logps))
    if getattr(objective, "reference", "base") == "base":
        torch.testing.assert_close(gradients[1], -gradients[0])
    rising = gradients[0] < gradients[1]
    assert torch.equal(rising, (advantages > 0)[:, None].expand(5, 4))


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o.needs_groups], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize(
    ("logp", "anchor"), [(0.0, -INF), (-INF, 0.0), (1e4, -1e4), (-1e4, 0.0), (0.0, -89.0), (0.0, -29.0), (-90.0, 0.0)]
)
def test_infinite_log_ratios_stay_finite(
    objective: ExtremeObjective, logp: float, anchor: float, advantage: float, dtype: torch.dtype
) -> None:
    # Among ordinary tokens of the same response.
    logps = torch.tensor([[logp, -1.0], [-1.0, logp]], dtype=dtype, requires_grad=True)
    anchors = torch.tensor([[anchor, -1.5], [-1.5, anchor]], dtype=dtype)
    advantages = torch.tensor([advantage, -advantage], dtype=dtype)
    terms = objective(logps, anchors, torch.ones(2, 2).bool(), torch.ones(2), advantages)
    terms.sum().backward()
    assert torch.isfinite(terms).all()
    assert torch.isfinite(grad(logps)).all()
    assert torch.isfinite(grad(logps).norm())
