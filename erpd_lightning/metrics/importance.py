"""Importance ratios `p / sampler` of tokens or of responses: how many samples they leave, and how far out they go."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .sums import Float64Metric


class Tail(NamedTuple):
    """The upper tail of log-ratios, float64 scalars.

    Attributes:
        share: of all log-ratios, those above the threshold.
        maximum: the greatest log-ratio, in nats.
    """

    share: Tensor
    maximum: Tensor


def effective_sample_size(log_ratios: Tensor, mask: Tensor | None = None) -> Tensor:
    """`(sum w)^2 / (n sum w^2)` of importance ratios w: 1 where all are alike, 1/n where one outweighs the rest.

    Kish's effective sample size as a share of the samples. It stays finite where a ratio itself would not.

    Args:
        log_ratios: (...) `log w` in nats, of tokens or of responses; minus infinity is a weight of 0.
        mask: (...) bool, True on what counts; None for all of it.

    Returns:
        A float64 scalar; NaN if there is nothing, no weight at all, or an infinite one.

    Raises:
        ValueError: if shapes do not fit.
    """
    kept = _counted(log_ratios, mask)
    return _effective_share(_log_of_sum(kept), _log_of_sum(2 * kept), kept.new_tensor(len(kept)))


def _effective_share(log_sum: Tensor, log_sum_squares: Tensor, count: Tensor) -> Tensor:
    return (2 * log_sum - log_sum_squares).exp() / count


def _log_of_sum(logs: Tensor) -> Tensor:
    """How logs of sums are added, over batches and over ranks: (k,) to a scalar."""
    return logs.logsumexp(0)


class EffectiveSampleSize(Float64Metric):
    """`effective_sample_size` of all importance ratios seen."""

    higher_is_better = True
    log_sum: Tensor
    log_sum_squares: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Logs of sums: the sums themselves leave the range of float64 where log-ratios are some hundreds of nats.
        for name in ("log_sum", "log_sum_squares"):
            self.add_state(name, torch.tensor(-torch.inf, dtype=torch.float64), dist_reduce_fx=_log_of_sum)
        self.add_sums("count")

    def update(self, log_ratios: Tensor, mask: Tensor | None = None) -> None:
        """Adds log-ratios, as in `effective_sample_size`."""
        kept = _counted(log_ratios, mask)
        self.log_sum = _log_of_sum(torch.cat([self.log_sum[None], kept]))
        self.log_sum_squares = _log_of_sum(torch.cat([self.log_sum_squares[None], 2 * kept]))
        self.count = self.count + len(kept)

    def compute(self) -> Tensor:
        return _effective_share(self.log_sum, self.log_sum_squares, self.count)


def ratio_tail(log_ratios: Tensor, threshold: float, mask: Tensor | None = None) -> Tail:
    """Share of log-ratios above a threshold, and the greatest one.

    Unlike a quantile, both are exact however the data are split.

    Args:
        log_ratios: (...) in nats, of tokens or of responses.
        threshold: in nats; what equals it is not above.
        mask: (...) bool, True on what counts; None for all of it.

    Returns:
        Both NaN if there is nothing, or a log-ratio is NaN.

    Raises:
        ValueError: if shapes do not fit, or the threshold is NaN.
    """
    _check_threshold(threshold)
    return _tail(*_tail_sums(log_ratios, threshold, mask))


def _check_threshold(threshold: float) -> None:
    if math.isnan(threshold):
        raise ValueError("the threshold is NaN; it has to be a log-ratio in nats")


def _tail_sums(log_ratios: Tensor, threshold: float, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """How many are above, how many there are, and the greatest."""
    kept = _counted(log_ratios, mask)
    # NaN compares as not above, and would be lost.
    above = torch.where(kept.isnan(), torch.nan, (kept > threshold).double())
    least = kept.new_full((1,), -torch.inf)
    return above.sum(), kept.new_tensor(len(kept)), torch.cat([least, kept]).max()


def _tail(above: Tensor, count: Tensor, maximum: Tensor) -> Tail:
    return Tail(above / count, torch.where(count == 0, torch.nan, maximum))


class RatioTail(Float64Metric):
    """`ratio_tail` of all importance ratios seen.

    Args:
        threshold: in nats.
        **kwargs: those of `torchmetrics.Metric`.

    Raises:
        ValueError: as `ratio_tail` does.
    """

    above: Tensor
    count: Tensor
    maximum: Tensor

    def __init__(self, threshold: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_threshold(threshold)
        self.threshold = threshold
        self.add_sums("above", "count")
        self.add_state("maximum", torch.tensor(-torch.inf, dtype=torch.float64), dist_reduce_fx="max")

    def update(self, log_ratios: Tensor, mask: Tensor | None = None) -> None:
        """Adds log-ratios, as in `ratio_tail`."""
        above, count, maximum = _tail_sums(log_ratios, self.threshold, mask)
        self.above, self.count = self.above + above, self.count + count
        self.maximum = torch.maximum(self.maximum, maximum)

    def compute(self) -> Tail:
        return _tail(self.above, self.count, self.maximum)


def _counted(log_ratios: Tensor, mask: Tensor | None) -> Tensor:
    """(n,) float64, those that count."""
    log_ratios = log_ratios.detach().double()
    if mask is None:
        return log_ratios.flatten()
    if mask.dtype != torch.bool or mask.shape != log_ratios.shape:
        shapes = f"{tuple(mask.shape)} for log-ratios of {tuple(log_ratios.shape)}"
        raise ValueError(f"the mask has to be bool and of their shape, got {mask.dtype} of {shapes}")
    return log_ratios[mask]
