import math
from typing import Any

import pytest
import torch
from torch import Tensor

from erpd_lightning.objectives import SquaredError
from support import reference
from support.reference import grad

MASK = torch.arange(4) < torch.tensor([[4], [1], [2], [3], [4]])


def some_batch() -> tuple[Tensor, Tensor, Tensor]:
    old = -3 * torch.rand(5, 4, dtype=torch.float64)
    logps = old + torch.randn(5, 4, dtype=torch.float64)
    return logps, old, torch.tensor([1.5, -0.5, 0.0, -2.0, 0.3], dtype=torch.float64)


def test_by_hand() -> None:
    log_ratio = torch.tensor([[1.0, 2.0, 9.0], [-4.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    advantages = torch.tensor([2.0, -1.0])
    # (0.5 * 3 - 2)^2, (0.5 * -4 + 1)^2
    others = (torch.zeros(2, 3), mask, torch.zeros(2), advantages)
    losses = SquaredError("sequence", 0.5)(log_ratio, *others)
    assert losses.tolist() == [0.25, 1.0]
    losses = SquaredError("token", 0.5)(log_ratio, *others)
    assert losses[mask].tolist() == [2.25, 1.0, 1.0]


@pytest.mark.parametrize("target", ["base", None])
@pytest.mark.parametrize("beta", [0.1, 2.0, None])
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_agrees_with_reference_and_its_gradient(level: Any, beta: float | None, target: Any) -> None:
    logps, old, advantages = some_batch()
    logps.requires_grad_()
    objective = SquaredError(level, beta, target)
    losses = objective(logps, old, MASK, torch.zeros(5), advantages)
    beta = {"sequence": 0.1, "token": 1.0}[level] if beta is None else beta
    log_ratio = logps if target is None else logps - old
    expected = reference.squared_errors(log_ratio, MASK, advantages, level, beta)
    assert losses.detach().numpy() == pytest.approx(expected, abs=1e-12)

    # d (beta S - A)^2 / d logp_t = 2 beta (beta S - A), S the sum the token is in
    losses.sum().backward()
    for b in range(5):
        tokens = [t for t in range(4) if MASK[b, t]]
        for t in tokens:
            total = sum(float(log_ratio[b, u]) for u in (tokens if level == "sequence" else [t]))
            slope = 2 * beta * (beta * total - float(advantages[b]))
            assert grad(logps)[b, t].item() == pytest.approx(slope, abs=1e-12)
    assert torch.autograd.gradcheck(lambda x: objective(x, old, MASK, torch.zeros(5), advantages), logps)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_the_optimum_is_a_log_ratio_of_the_advantage_over_beta(level: Any) -> None:
    _, old, advantages = some_batch()
    logps = old.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logps], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        losses = SquaredError(level, 0.5)(logps, old, MASK, torch.zeros(5), advantages)
        total = losses.sum() if level == "sequence" else losses[MASK].sum()
        total.backward()
        return total

    optimizer.step(loss)
    log_ratio = (logps.detach() - old).where(MASK, 0.0)
    if level == "sequence":
        torch.testing.assert_close(log_ratio.sum(-1), advantages / 0.5, atol=1e-5, rtol=0)
    else:
        expected = (advantages / 0.5)[:, None].expand(5, 4).where(MASK, 0.0)
        torch.testing.assert_close(log_ratio, expected, atol=1e-5, rtol=0)


def test_what_the_loss_is_given_for() -> None:
    assert SquaredError().per == "response"
    assert SquaredError("token").per == "token"
    assert SquaredError().needs_groups


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_settings_out_of_range_are_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="beta is"):
        SquaredError(beta=beta)
    with pytest.raises(ValueError, match="level is 'word'"):
        SquaredError("word")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reference is 'first'"):
        SquaredError(reference="first")  # type: ignore[arg-type]
