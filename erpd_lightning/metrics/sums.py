"""Ratios of float64 sums whose standard errors count prompts, not samples."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class Ratio(NamedTuple):
    """A ratio of two sums and its standard error, float64 scalars in the same unit."""

    value: Tensor
    stderr: Tensor


def clustered_ratio(numerator: Tensor, denominator: Tensor) -> Ratio:
    """`sum x / sum y` over clusters, with a standard error whose sampling unit is the cluster.

    What is sampled for one prompt belongs together: x and y are sums over all of a prompt's
    responses, such as its KL in nats and its number of tokens. The standard error is the delta
    method's, `sqrt(n / (n - 1) * sum (x - r y)^2) / |sum y|`.

    Args:
        numerator: (P,) x of each cluster.
        denominator: (P,) y of each cluster.

    Returns:
        The ratio and its standard error. Both are NaN if y sums to zero, as without any cluster;
        the standard error of a single cluster is NaN.

    Raises:
        ValueError: If these are not two vectors of one length.

    Example:
        >>> kl_nats, tokens = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])
        >>> ratio = clustered_ratio(kl_nats, tokens)
        >>> ratio.value.item(), ratio.stderr.item()
        (1.0, 0.5)
    """
    check_same_vector(numerator, denominator)
    return _ratio(*_ratio_sums(numerator, denominator))


def check_same_vector(first: Tensor, second: Tensor) -> None:
    """Refuse what is not two vectors of one length.

    Raises:
        ValueError: Names the two shapes.
    """
    if first.ndim != 1 or first.shape != second.shape:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"expected two vectors with one entry per prompt, got shapes {shapes}")


def _ratio_sums(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The sufficient statistics of a ratio: n and the sums of x, y, xx, xy, yy."""
    x, y = x.detach().double(), y.detach().double()
    return x.new_tensor(len(x)), x.sum(), y.sum(), x @ x, x @ y, y @ y


def _ratio(n: Tensor, x: Tensor, y: Tensor, xx: Tensor, xy: Tensor, yy: Tensor) -> Ratio:
    value = torch.where(y == 0, torch.nan, x / y)
    squares = (xx - 2 * value * xy + value**2 * yy).clamp(min=0)  # rounding may fall below zero
    variance = torch.where(n > 1, n / (n - 1) * squares, torch.nan)
    return Ratio(value, variance.sqrt() / y.abs())


class Float64Metric(Metric):
    """Metric whose states stay float64 sums, whatever becomes of the module that holds it.

    Args:
        *names: Names of its states. Each starts at 0 and is reduced over ranks by adding.
        **kwargs: Those of `torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, *names: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in names:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        # Follow to another device only. precision="bf16-true" converts every module that Lightning
        # holds: sums would be rounded, and ranks with and without any would differ in dtype.
        return super()._apply(lambda state: state.to(fn(state).device), exclude_state)


class ClusteredRatio(Float64Metric):
    """`clustered_ratio` of all clusters seen.

    Args:
        **kwargs: Those of `torchmetrics.Metric`.

    Example:
        >>> metric = ClusteredRatio()
        >>> metric.update(torch.tensor([1.0]), torch.tensor([2.0]))
        >>> metric.update(torch.tensor([3.0]), torch.tensor([2.0]))
        >>> metric.compute().stderr.item()
        0.5
    """

    n: Tensor
    sum_x: Tensor
    sum_y: Tensor
    sum_xx: Tensor
    sum_xy: Tensor
    sum_yy: Tensor

    _STATES = ("n", "sum_x", "sum_y", "sum_xx", "sum_xy", "sum_yy")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(*self._STATES, **kwargs)

    def update(self, numerator: Tensor, denominator: Tensor) -> None:
        """Add clusters: (P,) x and (P,) y of each. A cluster comes in one call."""
        check_same_vector(numerator, denominator)
        for name, added in zip(self._STATES, _ratio_sums(numerator, denominator), strict=True):
            setattr(self, name, getattr(self, name) + added)

    def compute(self) -> Ratio:
        return _ratio(*(getattr(self, name) for name in self._STATES))
