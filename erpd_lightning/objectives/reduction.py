"""Reductions over masked tensors: the only places where a loss is summed."""

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the `values` where the bool `mask` (broadcastable to them) is True; a scalar.

    Entries that are masked out may be infinite or NaN: they reach neither the sum nor the gradient.
    """
    # A product with the mask would turn a masked-out infinity into NaN.
    return torch.where(mask, values, 0.0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the `values` where the `mask` is True; a scalar, 0 for an empty mask."""
    return masked_sum(values, mask) / mask.expand_as(values).sum().clamp(min=1)
