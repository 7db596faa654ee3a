"""Ratios of sums over clusters, and their standard errors."""

import numpy as np
import pytest
import torch

from erpd_lightning.metrics import (
    ClusteredRatio,
    clustered_ratio,
)
from support import reference
from support.metric_inputs import draw_clusters


def test_ratio_by_hand() -> None:
    # r = 4/4; residuals -1 and 1; sqrt(2/1 * 2) / 4
    ratio = clustered_ratio(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
    assert ratio.value.item() == 1.0
    assert ratio.stderr.item() == 0.5


@pytest.mark.parametrize("clusters", [2, 3, 50])
def test_ratio_matches_the_reference(clusters: int) -> None:
    x, y = draw_clusters(clusters, (clusters,))
    ratio = clustered_ratio(torch.from_numpy(x), torch.from_numpy(y))
    assert [ratio.value.item(), ratio.stderr.item()] == pytest.approx(reference.ratio_by_prompts(list(x), list(y)))


def test_ratio_with_equal_denominators_is_a_mean() -> None:
    x, _ = draw_clusters(0, (20,))
    ratio = clustered_ratio(torch.from_numpy(x), torch.ones(20))
    assert ratio.value.item() == pytest.approx(x.mean())
    assert ratio.stderr.item() == pytest.approx(x.std(ddof=1) / np.sqrt(20))


def test_ratio_counts_clusters_not_what_is_in_them() -> None:
    x, y = draw_clusters(1, (30,))
    once = clustered_ratio(torch.from_numpy(x), torch.from_numpy(y))
    larger = clustered_ratio(torch.from_numpy(4 * x), torch.from_numpy(4 * y))
    assert torch.allclose(torch.stack(once), torch.stack(larger), rtol=1e-12)


def test_stderr_is_the_spread_over_repeated_experiments() -> None:
    x, y = draw_clusters(2, (20_000, 200))
    spread = (x.sum(1) / y.sum(1)).std()
    experiments = torch.from_numpy(np.stack([x[:500], y[:500]], axis=1))
    stderrs = [clustered_ratio(*experiment).stderr for experiment in experiments]
    # The spread of 20,000 experiments is known to 0.5 %, the mean of 500 estimates to 0.3 %.
    assert torch.stack(stderrs).mean().item() == pytest.approx(spread, rel=0.02)


def test_ratio_of_nothing_is_unknown() -> None:
    none = clustered_ratio(torch.empty(0), torch.empty(0))
    assert none.value.isnan()
    assert none.stderr.isnan()
    one = clustered_ratio(torch.tensor([1.0]), torch.tensor([2.0]))
    assert one.value.item() == 0.5
    assert one.stderr.isnan()
    unmeasured = clustered_ratio(torch.tensor([1.0, 0.0]), torch.zeros(2))
    assert unmeasured.value.isnan()
    assert unmeasured.stderr.isnan()


@pytest.mark.parametrize("factor", [0.1, 0.3, 0.7, 1 / 3])
def test_ratio_without_spread_has_no_error(factor: float) -> None:
    y = torch.tensor([1.0, 3.0, 7.0], dtype=torch.float64)
    ratio = clustered_ratio(factor * y, y)
    assert ratio.value.item() == pytest.approx(factor)
    assert ratio.stderr.item() == pytest.approx(0.0, abs=1e-8)


def test_ratio_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"shapes \(2, 1\) and \(2, 1\)"):
        clustered_ratio(torch.ones(2, 1), torch.ones(2, 1))
    with pytest.raises(ValueError, match="one entry per prompt"):
        ClusteredRatio().update(torch.ones(2), torch.ones(3))
