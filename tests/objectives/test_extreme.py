import math

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
    flip_outcomes,
    masked_sum,
)
from support import reference
from support.reference import grad

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
    """Log-probs, those of pi_old, and advantages of both signs and zero; log-ratios in about +-3."""
    old = -3 * torch.rand(5, 4, dtype=dtype)
    logps = old + 1.2 * torch.randn(5, 4, dtype=dtype)
    return logps, old, torch.tensor([1.5, -0.5, 0.0, -2.0, 0.3], dtype=dtype)


def sapo(logps: Tensor, old: Tensor, advantages: Tensor, *taus: float) -> Tensor:
    """Loss where every token counts."""
    return SAPO(*taus)(logps, old, torch.ones_like(logps).bool(), torch.zeros(len(logps)), advantages)


def test_sapo_by_hand() -> None:
    logps = torch.tensor([[0.0, math.log(2.0)], [0.0, math.log(2.0)]], dtype=torch.float64)
    result = sapo(logps, torch.zeros_like(logps), torch.tensor([1.0, -1.0]).double())
    # A = +1, tau = 1:    r = 1: -4 s(0) = -2;                 r = 2: -4 s(1) = -4 * 0.7310585786
    # A = -1, tau = 1.05: r = 1: (4/1.05) / 2 = 1.9047619048;  r = 2: (4/1.05) s(1.05)
    #                     s(1.05) = 1 / (1 + 0.3499377491) = 0.7407748992
    expected = [-2.0, -2.9242343145, 1.9047619048, 2.8219996159]
    assert result.flatten().tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("taus", [(1.0, 1.05), (0.5, 2.0), (3.0, 0.7)])
def test_sapo_agrees_with_reference(taus: tuple[float, float], dtype: torch.dtype, tolerance: float) -> None:
    batch = some_batch(dtype)
    result = sapo(*batch, *taus)
    assert result.dtype == dtype
    assert result.numpy() == pytest.approx(reference.sapo_loss(*batch, *taus), abs=tolerance)
    default = sapo(*batch)
    assert default.numpy() == pytest.approx(reference.sapo_loss(*batch), abs=tolerance)


@pytest.mark.parametrize("taus", [(1.0, 1.05), (0.5, 2.0)])
def test_sapo_gradient(taus: tuple[float, float]) -> None:
    logps, old, advantages = some_batch()
    logps.requires_grad_()

    def loss(logps: Tensor) -> Tensor:
        return sapo(logps, old, advantages, *taus)

    assert torch.autograd.gradcheck(loss, logps)
    (gradient,) = torch.autograd.grad(loss(logps).sum(), logps)
    expected = reference.sapo_gradient(logps, old, advantages, *taus)
    assert gradient.numpy() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("log_ratio", [-12.0, -9.0, -5.0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_sapo_guards_leave_ordinary_ratios_alone(log_ratio: float, advantage: float) -> None:
    logps = torch.tensor([[log_ratio]], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.zeros(1, 1).double(), torch.tensor([advantage]).double()
    sapo(logps, old, advantages).sum().backward()
    expected = reference.sapo_gradient(logps, old, advantages).item()
    assert expected != 0
    assert grad(logps).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("taus", [(1.0, 1.05), (0.2, 5.0)])
def test_sapo_at_a_ratio_of_one_is_the_policy_gradient(taus: tuple[float, float]) -> None:
    """At r = 1 the slope is 4/tau * 1/4 * tau * A: the temperature cancels and -A is left."""
    old = -torch.rand(3, 4, dtype=torch.float64)
    logps = old.clone().requires_grad_()
    advantages = torch.tensor([1.5, -0.5, 0.0], dtype=torch.float64)
    losses = sapo(logps, old, advantages, *taus)
    losses.sum().backward()
    torch.testing.assert_close(grad(logps), -advantages[:, None].expand(3, 4))


def test_sapo_at_a_ratio_of_one_ascends_the_expected_reward_by_enumeration() -> None:
    """Summed over all outcomes with their probability: the gradient of -E[A], exactly."""
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(5, dtype=torch.float64)
    logp = torch.log_softmax(logits, -1)
    losses = sapo(logp[:, None], logp.detach()[:, None], advantages)
    (gradient,) = torch.autograd.grad((logp.detach().exp() * losses[:, 0]).sum(), logits)
    probability = torch.softmax(logits, -1)
    (expected,) = torch.autograd.grad(-(probability * advantages).sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize(
    ("logp", "old", "gate"),
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
def test_sapo_extreme_ratios(logp: float, old: float, gate: float | None, advantage: float, dtype: torch.dtype) -> None:
    tau = 1.0 if advantage > 0 else 1.05
    logps = torch.tensor([[logp]], dtype=dtype, requires_grad=True)
    losses = sapo(logps, torch.tensor([[old]], dtype=dtype), torch.tensor([advantage], dtype=dtype))
    gate = reference.sigmoid(-tau) if gate is None else gate
    assert losses.item() == pytest.approx(-(4 / tau) * gate * advantage, rel=1e-6)
    losses.sum().backward()
    assert abs(grad(logps).item()) < 1e-6  # false for NaN too


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sapo_loss_has_the_type_of_the_log_probs(dtype: torch.dtype) -> None:
    other = torch.float32 if dtype == torch.float64 else torch.float64
    logps, old, advantages = some_batch(dtype)
    assert sapo(logps, old, advantages.to(other)).dtype == dtype


def test_cross_entropy_by_hand() -> None:
    logps = torch.tensor([[-0.25, -2.0]], requires_grad=True)
    result = CrossEntropy()(logps, torch.zeros(1, 2), torch.ones(1, 2).bool(), torch.ones(1), torch.zeros(1))
    assert result.tolist() == [[0.25, 2.0]]
    result.sum().backward()
    assert grad(logps).tolist() == [[-1.0, -1.0]]


def test_sapo_has_its_settings_and_is_an_extreme_objective() -> None:
    logps, old, advantages = some_batch()
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]).double()
    for objective, taus in [(SAPO(), (1.0, 1.05)), (SAPO(0.5, 2.0), (0.5, 2.0))]:
        assert isinstance(objective, ExtremeObjective)
        result = objective(logps, old, EVERYWHERE, rewards, advantages)
        expected = reference.sapo_loss(logps, old, advantages, *taus)
        assert result.numpy() == pytest.approx(expected, abs=1e-12)


def test_sapo_selects_responses_with_an_advantage() -> None:
    advantages = torch.tensor([1.5, 0.0, -0.5, 0.0])
    selected = SAPO().select(torch.tensor([1.0, 1.0, 0.0, 0.0]), advantages)
    assert selected.dtype == torch.bool
    assert selected.tolist() == [True, False, True, False]


@pytest.mark.parametrize("tau", [0.0, -1.0])
def test_sapo_refuses_a_temperature_that_is_not_positive(tau: float) -> None:
    with pytest.raises(ValueError, match="tau_positive"):
        SAPO(tau_positive=tau)
    with pytest.raises(ValueError, match="tau_negative"):
        SAPO(tau_negative=tau)


def test_cross_entropy_takes_responses_with_reward_1() -> None:
    objective = CrossEntropy()
    assert isinstance(objective, ExtremeObjective)
    rewards, advantages = torch.tensor([1.0, 0.0, 0.5, 1.0]), torch.tensor([0.0, -1.0, 1.0, 2.0])
    selected = objective.select(rewards, advantages)
    assert selected.dtype == torch.bool
    assert selected.tolist() == [True, False, False, True]

    logps = torch.tensor([[-1.0, -2.0], [-3.0, -INF], [-4.0, -5.0], [-0.5, -1e4]])
    logps.requires_grad_()
    losses = objective(logps, torch.zeros(4, 2), torch.ones(4, 2).bool(), rewards, advantages)
    assert losses.tolist() == [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [0.5, 1e4]]
    losses.sum().backward()
    assert grad(logps).tolist() == [[-1.0, -1.0], [0.0, 0.0], [0.0, 0.0], [-1.0, -1.0]]


def test_cross_entropy_gradcheck() -> None:
    logps, old, advantages = some_batch()
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]).double()
    logps.requires_grad_()
    objective = CrossEntropy()
    assert torch.autograd.gradcheck(lambda x: objective(x, old, EVERYWHERE, rewards, advantages), logps)


def test_flipped_outcomes_turn_correct_into_incorrect() -> None:
    rewards, advantages = torch.tensor([1.0, 0.0, 0.25]), torch.tensor([1.5, -0.5, 0.0])
    flipped_rewards, flipped_advantages = flip_outcomes(rewards, advantages)
    assert flipped_rewards.tolist() == [0.0, 1.0, 1.0]
    assert flipped_advantages.tolist() == [-1.5, 0.5, 0.0]
    assert CrossEntropy().select(flipped_rewards, flipped_advantages).tolist() == [
        False,
        True,
        True,
    ]
    assert rewards.tolist() == [1.0, 0.0, 0.25]  # not in place
    assert advantages.tolist() == [1.5, -0.5, 0.0]


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.5, 1.0, 3.0])
def test_graded_rewards_are_correct_from_a_threshold(threshold: float) -> None:
    rewards = torch.tensor([-2.0, -1.0, 0.0, 0.25, 0.5, 1.0, 2.0, 3.0, torch.nan])
    objective = CrossEntropy()
    objective.correct_threshold = threshold
    correct = [bool(reward >= threshold) for reward in rewards.tolist()]
    assert objective.select(rewards, torch.zeros(9)).tolist() == correct
    logps, mask = torch.full((9, 1), -1.5), torch.ones(9, 1).bool()
    losses = objective(logps, logps, mask, rewards, torch.zeros(9))
    assert losses[:, 0].tolist() == [1.5 * each for each in correct]
    # What could not be checked is neither, also the other way round.
    flipped, _ = flip_outcomes(rewards, torch.zeros(9), threshold)
    assert objective.select(flipped, torch.zeros(9)).tolist() == [not each for each in correct[:-1]] + [False]
    assert flipped.dtype == rewards.dtype
    assert flipped.isnan().tolist() == rewards.isnan().tolist()
    assert CrossEntropy().correct_threshold == 1.0


def test_flipped_sapo_descends_where_sapo_ascends() -> None:
    """Flipping also exchanges the temperatures: the loss of -A, not minus the loss of A."""
    logps, old, advantages = some_batch()
    rewards = torch.zeros(5).double()
    flipped = SAPO()(logps, old, EVERYWHERE, *flip_outcomes(rewards, advantages))
    assert flipped.numpy() == pytest.approx(reference.sapo_loss(logps, old, -advantages), abs=1e-12)


def test_the_objective_is_abstract_in_both_methods() -> None:
    assert ExtremeObjective.__abstractmethods__ == {"select", "__call__"}
    with pytest.raises(TypeError):
        ExtremeObjective()  # type: ignore[abstract]


def test_only_what_lives_on_advantages_needs_groups() -> None:
    alone = [type(objective) for objective in OBJECTIVES if not objective.needs_groups]
    assert alone == [CrossEntropy]


def own_mask(objective: ExtremeObjective, mask: Tensor) -> Tensor:
    """What the sum over an objective's losses takes in."""
    return mask if objective.per == "token" else mask.any(-1)


@every_objective
@pytest.mark.parametrize("garbage", [0.0, 1e4, -1e4, -INF, float("nan")])
def test_padding_changes_neither_loss_nor_gradient(objective: ExtremeObjective, garbage: float) -> None:
    logps, old, advantages = some_batch()
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]).double()
    mask = torch.arange(4) < torch.tensor([[4], [1], [2], [3], [0]])

    def run(logps: Tensor, old: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        logps = logps.clone().requires_grad_()
        losses = objective(logps, old, mask, rewards, advantages)
        loss = masked_sum(losses, own_mask(objective, mask))
        loss.backward()
        assert (grad(logps)[~mask] == 0).all()
        return loss, grad(logps)[:, :4][mask[:, :4]]

    loss, gradient = run(logps, old, mask)
    dirty = torch.nn.functional.pad(logps.masked_fill(~mask, garbage), (0, 3), value=garbage)
    wide = torch.nn.functional.pad(mask, (0, 3), value=False)
    padded_loss, padded_gradient = run(dirty, torch.nn.functional.pad(old, (0, 3)), wide)
    assert (gradient != 0).any()
    torch.testing.assert_close(padded_loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(padded_gradient, gradient, rtol=1e-12, atol=0)


@every_objective
@pytest.mark.parametrize("responses", [0, 2])
def test_empty_mask_is_zero_and_runs_backward(objective: ExtremeObjective, responses: int) -> None:
    logps = torch.randn(responses, 3, requires_grad=True)
    mask, ones = torch.zeros(responses, 3, dtype=torch.bool), torch.ones(responses)
    losses = objective(logps, torch.zeros(responses, 3), mask, ones, ones)
    assert losses.shape == own_mask(objective, mask).shape
    assert torch.isfinite(losses).all()  # the mean over no tokens too
    loss = masked_sum(losses, own_mask(objective, mask))
    assert loss.item() == 0.0
    loss.backward()
    assert torch.equal(grad(logps), torch.zeros(responses, 3))


@every_objective
def test_losses_are_per_token_or_per_response(objective: ExtremeObjective) -> None:
    logps, old, advantages = some_batch()
    losses = objective(logps, old, EVERYWHERE, torch.ones(5).double(), advantages)
    assert losses.shape == ((5, 4) if objective.per == "token" else (5,))
    assert losses.dtype == torch.float64


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o.needs_groups], ids=lambda o: type(o).__name__)
def test_what_lives_on_advantages_is_the_objective_of_the_negative_advantage_when_flipped(
    objective: ExtremeObjective,
) -> None:
    """At a ratio of one, a step of the unlearned policy undoes one of the teacher."""
    _, old, advantages = some_batch()
    selected = objective.select(torch.ones(5), torch.tensor([1.5, 0.0, -0.5, 0.0, 2.0]))
    assert selected.tolist() == [True, False, True, False, True]
    gradients = []
    for outcomes in [(torch.ones(5), advantages), flip_outcomes(torch.ones(5), advantages)]:
        logps = old.clone().requires_grad_()
        objective(logps, old, EVERYWHERE, *outcomes).sum().backward()
        gradients.append(grad(logps))
    if getattr(objective, "reference", "base") == "base":
        torch.testing.assert_close(gradients[1], -gradients[0])
    rising = gradients[0] < gradients[1]
    assert torch.equal(rising, (advantages > 0)[:, None].expand(5, 4))


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o.needs_groups], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize(
    ("logp", "old"), [(0.0, -INF), (-INF, 0.0), (1e4, -1e4), (-1e4, 0.0), (0.0, -89.0), (0.0, -29.0), (-90.0, 0.0)]
)
def test_infinite_log_ratios_stay_finite(
    objective: ExtremeObjective, logp: float, old: float, advantage: float, dtype: torch.dtype
) -> None:
    # Among ordinary tokens of the same response.
    logps = torch.tensor([[logp, -1.0], [-1.0, logp]], dtype=dtype, requires_grad=True)
    old_logps = torch.tensor([[old, -1.5], [-1.5, old]], dtype=dtype)
    advantages = torch.tensor([advantage, -advantage], dtype=dtype)
    losses = objective(logps, old_logps, torch.ones(2, 2).bool(), torch.ones(2), advantages)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(grad(logps)).all()
    assert torch.isfinite(grad(logps).norm())
