"""Importance ratios `r = p / old` of tokens: effective sample size, tail, and share outside an interval.

The statistics are computed from sums. What a micro-batch adds are `importance_sums`; those of micro-batches, ranks and
optimiser steps are merged by `merge_importance_sums`; `importance_statistics` divides once. Sums of ratios are kept as
their logs: the sums themselves leave the range of float64 where log-ratios are some hundreds of nats.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class ImportanceSums(NamedTuple):
    """Sufficient statistics of importance ratios, float64: scalars, or `(N,)` for N parts.

    Attributes:
        tokens: Number of tokens.
        above_tail: Number of tokens with a ratio above the tail threshold.
        outside_interval: Number of tokens with a ratio outside the interval.
        log_sum: `log sum r`.
        log_sum_squares: `log sum r^2`.
        max_log_ratio: The greatest log-ratio, in nats.
    """

    tokens: Tensor
    above_tail: Tensor
    outside_interval: Tensor
    log_sum: Tensor
    log_sum_squares: Tensor
    max_log_ratio: Tensor


class ImportanceStatistics(NamedTuple):
    """Statistics of importance ratios, float64 scalars.

    Attributes:
        effective_sample_size: As a share of the tokens: 1 where all ratios are alike, 1/n where one outweighs the rest.
        max_log_ratio: The greatest log-ratio, in nats.
        tail_share: Share of the tokens with a ratio above the tail threshold.
        clipped_share: Share of the tokens with a ratio outside the interval.
    """

    effective_sample_size: Tensor
    max_log_ratio: Tensor
    tail_share: Tensor
    clipped_share: Tensor


def check_ratio_bounds(interval: tuple[float, float], tail: float) -> None:
    """Refuse bounds on ratios that are out of range.

    Raises:
        ValueError: Names the argument.

    Example:
        >>> check_ratio_bounds((1.28, 0.8), tail=10.0)
        Traceback (most recent call last):
            ...
        ValueError: interval is (1.28, 0.8): it must be two ratios, the smaller one first
    """
    if not 0 <= interval[0] < interval[1]:
        raise ValueError(f"interval is {interval}: it must be two ratios, the smaller one first")
    if not 0 < tail < math.inf:
        raise ValueError(f"tail is {tail}: it must be a positive, finite ratio")


def empty_importance_sums() -> ImportanceSums:
    """Sums over no tokens.

    Example:
        >>> empty_importance_sums().tokens.item(), empty_importance_sums().log_sum.item()
        (0.0, -inf)
    """
    zero, log_zero = torch.tensor([0.0, -math.inf], dtype=torch.float64)
    return ImportanceSums(zero, zero, zero, log_zero, log_zero, log_zero)


def importance_sums(log_ratios: Tensor, mask: Tensor, interval: tuple[float, float], tail: float) -> ImportanceSums:
    """Sums that the tokens of a micro-batch add.

    Args:
        log_ratios: (B, T) `log r` of each token in nats; minus infinity is a ratio of 0.
        mask: (B, T) bool, True on the tokens that count.
        interval: Least and greatest ratio that is not clipped.
        tail: Ratio above which a token is in the tail; one that equals it is not.

    Returns:
        Float64 scalars.

    Raises:
        ValueError: If the mask is not bool and of the shape of the log-ratios, these are not a matrix, or a bound is
            out of range.

    Example:
        >>> log_ratios = torch.tensor([[1.0, 2.0, 12.0]]).log()
        >>> sums = importance_sums(log_ratios, torch.tensor([[True, True, False]]), interval=(0.8, 1.28), tail=10.0)
        >>> sums.tokens.item(), sums.outside_interval.item(), sums.above_tail.item()
        (2.0, 1.0, 0.0)
    """
    check_ratio_bounds(interval, tail)
    if log_ratios.ndim != 2 or mask.dtype != torch.bool or mask.shape != log_ratios.shape:
        shapes = f"{tuple(mask.shape)} for log-ratios of {tuple(log_ratios.shape)}"
        raise ValueError(f"the mask has to be bool and of their shape (B, T), got {mask.dtype} of {shapes}")
    log_ratios = log_ratios.detach().double()
    low, high = (math.log(bound) if bound > 0 else -math.inf for bound in interval)
    # Selecting the tokens instead would make the host wait for the device.
    counted = torch.where(mask, log_ratios, -math.inf).flatten()
    least = counted.new_full((1,), -math.inf)
    return ImportanceSums(
        tokens=mask.sum().double(),
        above_tail=(mask & (log_ratios > math.log(tail))).sum().double(),
        outside_interval=(mask & ((log_ratios < low) | (log_ratios > high))).sum().double(),
        log_sum=counted.logsumexp(0),
        log_sum_squares=(2 * counted).logsumexp(0),
        max_log_ratio=torch.cat([least, counted]).max(),
    )


def merge_importance_sums(parts: ImportanceSums) -> ImportanceSums:
    """Sums over several parts: micro-batches, ranks or optimiser steps.

    Args:
        parts: `(N,)` fields, the sums of each part; N is at least 1.

    Returns:
        Float64 scalars.

    Raises:
        ValueError: If the fields are not vectors of one length.

    Example:
        >>> part = importance_sums(torch.zeros(1, 3), torch.ones(1, 3).bool(), interval=(0.8, 1.28), tail=10.0)
        >>> twice = ImportanceSums(*(torch.stack([field, field]) for field in part))
        >>> merge_importance_sums(twice).tokens.item()
        6.0
    """
    shapes = {tuple(field.shape) for field in parts}
    if len(shapes) != 1 or parts.tokens.ndim != 1 or not len(parts.tokens):
        raise ValueError(f"the sums of parts have to be vectors of one length, got shapes {sorted(shapes)}")
    return ImportanceSums(
        tokens=parts.tokens.sum(0),
        above_tail=parts.above_tail.sum(0),
        outside_interval=parts.outside_interval.sum(0),
        log_sum=parts.log_sum.logsumexp(0),
        log_sum_squares=parts.log_sum_squares.logsumexp(0),
        max_log_ratio=parts.max_log_ratio.amax(0),
    )


def importance_statistics(sums: ImportanceSums) -> ImportanceStatistics:
    """Statistics of the tokens behind some sums.

    The effective sample size is `(sum r)^2 / (n sum r^2)` (Kong 1992). It stays finite where a ratio itself would not.
    Unlike a quantile, maximum and shares are exact however the tokens were split.

    Args:
        sums: Scalar fields.

    Returns:
        NaN without any token or with a log-ratio that is NaN; the effective sample size is NaN also where all ratios
        are 0 or one is infinite.

    Raises:
        ValueError: If the fields are not scalars.

    Example:
        >>> ratios = torch.tensor([[1.0, 2.0, 3.0, 0.0]], dtype=torch.float64)
        >>> sums = importance_sums(ratios.log(), torch.ones(1, 4).bool(), interval=(0.8, 1.28), tail=2.5)
        >>> statistics = importance_statistics(sums)
        >>> round(statistics.effective_sample_size.item(), 4), statistics.tail_share.item()
        (0.6429, 0.25)
    """
    if any(field.ndim for field in sums):
        raise ValueError(f"the sums have to be scalars, got shapes {[tuple(field.shape) for field in sums]}")
    # A log-ratio that is NaN is neither above a bound nor below one: it would not be counted. The maximum keeps it.
    count = torch.where((sums.tokens == 0) | sums.max_log_ratio.isnan(), math.nan, sums.tokens)
    return ImportanceStatistics(
        effective_sample_size=(2 * sums.log_sum - sums.log_sum_squares - count.log()).exp(),
        max_log_ratio=torch.where(count.isnan(), math.nan, sums.max_log_ratio),
        tail_share=sums.above_tail / count,
        clipped_share=sums.outside_interval / count,
    )
