"""Metrics over prompts: pass@k, and ratios with standard errors that count prompts, not samples.

Functions and torchmetrics classes share their maths. The classes keep float64 sums and divide in
`compute` alone, so the result does not depend on how the prompts were split over batches and ranks.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class Ratio(NamedTuple):
    """A ratio of two sums and its standard error, float64 scalars in the same unit."""

    value: Tensor
    stderr: Tensor


def pass_at_k(correct: Tensor, samples: Tensor, k: int) -> Tensor:
    """Probability that one of `k` samples is right, without bias, for each prompt.

    `1 - C(n - c, k) / C(n, k)` for `c` right ones of `n` samples (Chen et al. 2021, arXiv
    2107.03374).

    Args:
        correct: (P,) long, right samples of each prompt.
        samples: (P,) long, all samples of each prompt.
        k: at least 1, at most the smallest number of samples.

    Returns:
        (P,) float64.

    Raises:
        ValueError: if `k` is out of range, or `correct` is not between 0 and `samples`.
    """
    _check_same_vector(correct, samples)
    if k < 1:
        raise ValueError(f"pass@k needs k of at least 1, not {k}")
    if (samples < k).any():
        raise ValueError(f"pass@{k} needs {k} samples of each prompt, one has {int(samples.min())}")
    if ((correct < 0) | (correct > samples)).any():
        raise ValueError("the correct samples must number between 0 and all samples")
    drawn = torch.arange(k, device=samples.device)
    # Drawing without replacement: draw j fails like those before it with (n - c - j) / (n - j).
    # With fewer wrong ones than draws one factor is 0, and with it the product.
    wrong_left = (samples - correct).double()[:, None] - drawn
    left = samples.double()[:, None] - drawn
    return 1 - (wrong_left / left).prod(dim=1)


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
    """
    _check_same_vector(numerator, denominator)
    return _ratio(*_ratio_sums(numerator, denominator))


def _check_same_vector(first: Tensor, second: Tensor) -> None:
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


class _PromptSums(Metric):
    """Float64 sums, reduced over ranks by adding."""

    is_differentiable = False
    full_state_update = False

    def __init__(self, *names: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in names:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(
        self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ""
    ) -> nn.Module:
        # Follow to another device only. precision="bf16-true" converts every module that Lightning
        # holds: sums would be rounded, and ranks with and without any would differ in dtype.
        return super()._apply(lambda state: state.to(fn(state).device), exclude_state)


class PassAtK(_PromptSums):
    """Mean of `pass_at_k` over prompts; NaN without any prompt.

    Args:
        k: at least 1.
        **kwargs: those of `torchmetrics.Metric`.

    Raises:
        ValueError: as `pass_at_k` does.
    """

    higher_is_better = True
    passed: Tensor
    prompts: Tensor

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__("passed", "prompts", **kwargs)
        if k < 1:
            raise ValueError(f"pass@k needs k of at least 1, not {k}")
        self.k = k

    def update(self, correct: Tensor, samples: Tensor) -> None:
        """Adds prompts: (P,) right and (P,) all samples of each. A prompt comes in one call."""
        self.passed = self.passed + pass_at_k(correct, samples, self.k).sum()
        self.prompts = self.prompts + len(correct)

    def compute(self) -> Tensor:
        return self.passed / self.prompts


class ClusteredRatio(_PromptSums):
    """`clustered_ratio` of all clusters seen."""

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
        """Adds clusters: (P,) x and (P,) y of each. A cluster comes in one call."""
        _check_same_vector(numerator, denominator)
        for name, added in zip(self._STATES, _ratio_sums(numerator, denominator), strict=True):
            setattr(self, name, getattr(self, name) + added)

    def compute(self) -> Ratio:
        return _ratio(*(getattr(self, name) for name in self._STATES))
