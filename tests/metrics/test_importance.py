"""Importance ratios: effective sample size, tail and clipped share, by hand and merged."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from erpd_lightning.metrics import (
    ImportanceSums,
    empty_importance_sums,
    importance_statistics,
    importance_sums,
    merge_importance_sums,
)
from support import reference
from support.metric_inputs import (
    TAIL,
    close,
    flat,
    make_data,
    row,
    statistics_of,
    sums_of,
)


def effective_sample_size(log_ratios: Tensor, mask: Tensor | None = None) -> Tensor:
    return statistics_of(log_ratios, mask).effective_sample_size


def stacked(parts: Sequence[ImportanceSums]) -> ImportanceSums:
    return ImportanceSums(*(torch.stack(field) for field in zip(*parts, strict=True)))


def test_effective_sample_size_by_hand() -> None:
    weights = row([1.0, 2.0, 3.0, 0.0])
    assert effective_sample_size(weights.log()).item() == pytest.approx(36 / (4 * 14), rel=1e-14)
    mask = torch.tensor([[True, False, True, False]])
    assert effective_sample_size(weights.log(), mask).item() == pytest.approx(16 / (2 * 10), rel=1e-14)


@pytest.mark.parametrize("size", [0.0, 200.0, -200.0, 1e4, -1e4])
def test_effective_sample_size_has_no_scale(size: float) -> None:
    log_ratios = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = reference.effective_share(log_ratios)
    assert 0.1 < expected < 0.9
    assert effective_sample_size(row(log_ratios + size)).item() == pytest.approx(expected, rel=1e-10)
    assert effective_sample_size(torch.full((1, 50), size)).item() == pytest.approx(1.0)
    assert effective_sample_size(row([size, size - 400, size - 400, size - 50])).item() == pytest.approx(0.25)


def test_effective_sample_size_that_is_unknown() -> None:
    inf = torch.inf
    for log_ratios in ([], [-inf, -inf], [inf, 0.0], [torch.nan, 0.0]):
        assert effective_sample_size(row(log_ratios)).isnan(), log_ratios


def test_ratio_tail_by_hand() -> None:
    def tail(log_ratios: Tensor, threshold: float, mask: Tensor | None = None) -> list[float]:
        """Share above a threshold in nats, and the greatest log-ratio."""
        found = statistics_of(log_ratios, mask, math.exp(threshold))
        return [found.tail_share.item(), found.max_log_ratio.item()]

    log_ratios = torch.tensor([[0.0, 2.0, 1.0], [-200.0, 200.0, 1.5]], dtype=torch.float64)
    assert tail(log_ratios, 1.0) == [3 / 6, 200.0]
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert tail(log_ratios, 1.0, mask) == [1 / 4, 2.0]
    assert tail(log_ratios, 200.0) == [0.0, 200.0]
    assert tail(row([-5.0, -3.0]), 0.0) == [0.0, -3.0]


def test_clipped_share_by_hand() -> None:
    log_ratios = row([0.25, 0.5, 1.0, 2.0, 4.0]).log()
    assert statistics_of(log_ratios).clipped_share.item() == 2 / 5
    assert statistics_of(log_ratios, torch.tensor([[True, True, True, False, False]])).clipped_share.item() == 1 / 3


def test_ratios_without_a_lower_bound_are_not_clipped_below() -> None:
    sums = importance_sums(row([-torch.inf, -800.0, 1.0]), torch.ones(1, 3).bool(), (0.0, 2.0), TAIL)
    assert importance_statistics(sums).clipped_share.item() == 1 / 3


def test_statistics_that_are_unknown() -> None:
    for log_ratios in ([], [torch.nan, 5.0]):
        assert all(math.isnan(each) for each in flat(statistics_of(row(log_ratios))))
    assert all(math.isnan(each) for each in flat(importance_statistics(empty_importance_sums())))


@pytest.mark.parametrize("split", [[6], [1] * 6, [2, 0, 4]])
def test_merged_sums_equal_the_sums_of_the_whole(split: list[int]) -> None:
    data = make_data()
    log_ratios, mask = data.log_ratios[:6], data.mask[:6]
    parts = [sums_of(*part) for part in zip(log_ratios.split(split), mask.split(split), strict=True)]
    merged = merge_importance_sums(stacked([empty_importance_sums(), *parts]))
    assert flat(merged) == close(flat(sums_of(log_ratios, mask)))
    again = merge_importance_sums(stacked([merged, merged]))
    assert flat(importance_statistics(again)) == close(flat(importance_statistics(merged)))
    assert again.tokens.item() == 2 * merged.tokens.item()


def test_importance_functions_refuse() -> None:
    for mask in (torch.ones(1, 2).long(), torch.ones(1, 3).bool()):
        with pytest.raises(ValueError, match="the mask has to be bool and of their shape"):
            sums_of(torch.zeros(1, 2), mask)
    with pytest.raises(ValueError, match=r"log-ratios of \(2,\)"):
        sums_of(torch.zeros(2))
    for interval, tail in (((1.0, 0.5), 2.0), ((-1.0, 0.5), 2.0), ((math.nan, 1.0), 2.0)):
        with pytest.raises(ValueError, match="interval is"):
            importance_sums(torch.zeros(1, 2), torch.ones(1, 2).bool(), interval, tail)
    for tail in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="tail is"):
            sums_of(torch.zeros(1, 2), tail=tail)
    sums = sums_of(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="vectors of one length"):
        merge_importance_sums(sums)
    with pytest.raises(ValueError, match="vectors of one length"):
        merge_importance_sums(ImportanceSums(*(field[None][:0] for field in sums)))
    with pytest.raises(ValueError, match="have to be scalars"):
        importance_statistics(stacked([sums, sums]))
