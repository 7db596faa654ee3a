"""Truncated importance weights for what the log-probs of another engine differ from the trainer's by."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from erpd_lightning.data.batching import RolloutBatch, RolloutTable, replaced
from erpd_lightning.errors import InvalidArgument
from erpd_lightning.modules.extreme_region import ExtremeRegionModule
from erpd_lightning.objectives.regression import SquaredError
from support.policies import make_rows, save_policy, write_rollouts


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy") / "base")


@pytest.fixture
def batch(tmp_path: Path) -> RolloutBatch:
    """Rollouts whose log-probs by the trainer are up to half a nat off, to both sides."""
    table = RolloutTable.from_arrow(write_rollouts(tmp_path / "rollouts", make_rows(groups=2)).table())
    advantages = torch.linspace(-1, 1, 8)
    made = table.batch(torch.arange(8), advantages, step_tokens=10, step_responses=8, last=True)
    off = torch.linspace(-0.5, 0.5, made.mask.numel()).view(made.mask.shape)
    return replaced(made, trainer_logps=(made.sampler_logps + off).where(made.mask, 0.0))


def loss(policy: Path, batch: RolloutBatch, **settings: Any) -> Tensor:
    module = ExtremeRegionModule(policy, **settings)
    module.configure_model()
    losses, _ = module.batch_loss(batch)
    return losses.detach()


def test_ratios_divide_by_the_trainers_log_probs(policy: Path, batch: RolloutBatch) -> None:
    found = loss(policy, batch)
    assert torch.equal(found, loss(policy, replaced(batch, sampler_logps=torch.zeros_like(batch.sampler_logps))))
    assert not torch.allclose(found, loss(policy, replaced(batch, trainer_logps=batch.sampler_logps)))


def test_the_loss_of_a_token_is_weighted(policy: Path, batch: RolloutBatch) -> None:
    plain, capped = loss(policy, batch), loss(policy, batch, importance_cap=1.2)
    ratios = (batch.trainer_logps - batch.sampler_logps)[batch.mask].exp()
    assert float(ratios.max()) > 1.2 > float(ratios.min())
    expected = plain[batch.mask] * ratios.clamp(max=1.2)
    assert capped[batch.mask].tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_the_loss_of_a_response_is_weighted_by_the_whole_of_it(policy: Path, batch: RolloutBatch) -> None:
    objective = SquaredError(level="sequence")
    plain, capped = (loss(policy, batch, objective=objective, importance_cap=cap) for cap in (None, 2.0))
    differences = (batch.trainer_logps - batch.sampler_logps).tolist()
    weights = [min(math.exp(sum(row)), 2.0) for row in differences]
    assert max(weights) == 2.0 > min(weights)
    assert capped.tolist() == pytest.approx([w * x for w, x in zip(weights, plain.tolist(), strict=True)], rel=1e-5)


def test_the_kl_term_is_not_weighted(policy: Path, batch: RolloutBatch) -> None:
    terms = [
        loss(policy, batch, kl_coef=coefficient, kl_estimator="k2", importance_cap=1.2) for coefficient in (0.0, 0.3)
    ]
    plain = [loss(policy, batch, kl_coef=coefficient, kl_estimator="k2") for coefficient in (0.0, 0.3)]
    torch.testing.assert_close(terms[1] - terms[0], plain[1] - plain[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cap", [0.0, -1.0, math.inf, math.nan])
def test_a_cap_that_is_none_is_refused(policy: Path, cap: float) -> None:
    with pytest.raises(InvalidArgument, match=r"importance_cap is .*: it must be a positive, finite ratio"):
        ExtremeRegionModule(policy, importance_cap=cap)
