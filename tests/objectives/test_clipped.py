import math
from typing import Any

import pytest
import torch
from torch import Tensor

from erpd_lightning.objectives import CISPO, GSPO, ExtremeObjective, PPOClip
from support import reference
from support.reference import grad

CLIPS = [(0.2, 0.2, None), (0.2, 0.28, None), (0.1, 0.5, 3.0), (1.0, 2.0, 1.5)]
MASK = torch.arange(4) < torch.tensor([[4], [1], [2], [3], [4]])


def some_batch(spread: float = 0.6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, those of pi_old, and advantages of both signs and zero."""
    old = -3 * torch.rand(5, 4, dtype=dtype)
    logps = old + spread * torch.randn(5, 4, dtype=dtype)
    return logps, old, torch.tensor([1.5, -0.5, 0.0, -2.0, 0.3], dtype=dtype)


def call(objective: ExtremeObjective, logps: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """Loss where every token counts."""
    return objective(logps, old, torch.ones_like(logps).bool(), torch.zeros(len(logps)), advantages)


def logs(*ratios: float) -> Tensor:
    return torch.tensor([ratios], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("advantage", "dual_clip", "expected"),
    [
        (2.0, None, [-1.0, -2.0, -2.4, -2.4]),  # ratios .5, 1, 1.5, 5 with clips .8 and 1.2
        (-2.0, None, [1.6, 2.0, 3.0, 10.0]),
        (-2.0, 3.0, [1.6, 2.0, 3.0, 6.0]),
        (2.0, 3.0, [-1.0, -2.0, -2.4, -2.4]),
    ],
)
def test_ppo_by_hand(advantage: float, dual_clip: float | None, expected: list[float]) -> None:
    ratios = logs(0.5, 1.0, 1.5, 5.0)
    objective, advantages = PPOClip(dual_clip=dual_clip), torch.tensor([advantage]).double()
    losses = call(objective, ratios, torch.zeros_like(ratios), advantages)
    assert losses[0].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("clips", CLIPS)
def test_ppo_agrees_with_reference_and_its_gradient(clips: Any) -> None:
    logps, old, advantages = some_batch()
    logps.requires_grad_()
    losses = PPOClip(*clips)(logps, old, MASK, torch.zeros(5), advantages)
    assert losses.detach().numpy() == pytest.approx(reference.ppo_loss(logps, old, advantages, *clips), abs=1e-12)
    losses.sum().backward()
    expected = reference.ppo_gradient(logps, old, advantages, *clips)
    assert grad(logps).numpy() == pytest.approx(expected, abs=1e-12)


def test_ppo_inside_its_clips_is_importance_sampling_by_enumeration() -> None:
    """Summed over all outcomes with the sampler's probability: -E_pi[A] and its gradient."""
    logits, other = torch.randn(2, 5, dtype=torch.float64)
    other = logits + 0.05 * other
    logits.requires_grad_()
    advantages = torch.randn(5, dtype=torch.float64)
    logp, sampler = logits.log_softmax(-1), other.log_softmax(-1)
    losses = call(PPOClip(), logp[:, None], sampler[:, None], advantages)[:, 0]
    found, expected = sampler.exp() @ losses, -(logp.exp() @ advantages)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, logits, retain_graph=True)
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected, logits))


def test_gspo_by_hand() -> None:
    # Geometric means of (2, 8), (1/4, 1), (2): 4, 1/2, 2
    logps = torch.cat([logs(2.0, 8.0), logs(0.25, 1.0), logs(2.0, 100.0)])
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    advantages = torch.tensor([1.0, -1.0, -3.0]).double()
    losses = GSPO(0.1, 0.5)(logps, torch.zeros_like(logps), mask, torch.zeros(3), advantages)
    assert losses.tolist() == pytest.approx([-1.5, 0.9, 6.0], abs=1e-12)


@pytest.mark.parametrize("clips", [(3e-4, 4e-4), (0.2, 0.4)])
def test_gspo_agrees_with_reference_and_its_gradient(clips: tuple[float, float]) -> None:
    logps, old, advantages = some_batch()
    logps.requires_grad_()
    losses = GSPO(*clips)(logps, old, MASK, torch.zeros(5), advantages)
    expected = reference.gspo_loss(logps, old, MASK, advantages, *clips)
    assert losses.detach().numpy() == pytest.approx(expected, abs=1e-12)
    losses.sum().backward()
    expected = reference.gspo_gradient(logps, old, MASK, advantages, *clips)
    assert (expected != 0).any()
    assert grad(logps).numpy() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("clips", [(1.0, 4.0), (0.2, 0.2)])
def test_cispo_is_a_weighted_policy_gradient(clips: tuple[float, float]) -> None:
    """The clipped ratio is a weight and gives no gradient; no token is left without one."""
    logps, old, advantages = some_batch(spread=1.5)
    logps.requires_grad_()
    losses = CISPO(*clips)(logps, old, MASK, torch.zeros(5), advantages)
    weights = [
        [reference.clip(math.exp(x - y), 1 - clips[0], 1 + clips[1]) for x, y in zip(*rows, strict=True)]
        for rows in zip(logps.tolist(), old.tolist(), strict=True)
    ]
    losses.sum().backward()
    for b in range(5):
        for t in range(4):
            expected = -weights[b][t] * float(advantages[b])
            assert grad(logps)[b, t].item() == pytest.approx(expected, abs=1e-12)
            assert losses[b, t].item() == pytest.approx(expected * float(logps[b, t].detach()), abs=1e-12)


@pytest.mark.parametrize("objective", [PPOClip(), GSPO(), CISPO()], ids=lambda o: type(o).__name__)
def test_at_a_ratio_of_one_they_are_the_policy_gradient(objective: ExtremeObjective) -> None:
    _, old, advantages = some_batch()
    logps = old.clone().requires_grad_()
    objective(logps, old, MASK, torch.zeros(5), advantages).sum().backward()
    expected = -advantages[:, None].expand(5, 4)
    if objective.per == "response":
        expected = (expected / MASK.sum(-1, keepdim=True)).where(MASK, 0.0)
    torch.testing.assert_close(grad(logps), expected)


def test_defaults_are_those_of_the_papers() -> None:
    assert vars(PPOClip()) == {"epsilon_low": 0.2, "epsilon_high": 0.2, "dual_clip": None}
    assert vars(GSPO()) == {"epsilon_low": 3e-4, "epsilon_high": 4e-4}
    assert vars(CISPO()) == {"epsilon_low": 1.0, "epsilon_high": 4.0}


@pytest.mark.parametrize("kind", [PPOClip, GSPO, CISPO])
@pytest.mark.parametrize("value", [0.0, -0.1, math.nan, math.inf])
def test_bounds_out_of_range_are_refused(kind: Any, value: float) -> None:
    with pytest.raises(ValueError, match="epsilon_low is"):
        kind(epsilon_low=value)
    with pytest.raises(ValueError, match="epsilon_high is"):
        kind(epsilon_high=value)
    with pytest.raises(ValueError, match="epsilon_low is"):
        kind(epsilon_low=1.1)


@pytest.mark.parametrize("value", [1.0, 0.5, -3.0, math.inf, math.nan])
def test_a_dual_clip_not_above_one_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="dual_clip is"):
        PPOClip(dual_clip=value)
