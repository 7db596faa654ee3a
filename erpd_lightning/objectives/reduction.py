"""The reduction over masked tensors: the only place where a loss is summed."""

import torch
from torch import Tensor

from .shapes import check_shape


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the `values` where the bool `mask`, of the same shape, is True; a scalar.

    Entries that are masked out may be infinite or NaN: they reach neither the sum nor the gradient.

    Raises:
        ValueError: for a mask of another shape than the values'.

    Example:
        >>> masked_sum(torch.tensor([1.0, 2.0, torch.inf]), torch.tensor([True, True, False]))
        tensor(3.)
    """
    check_shape(values.shape, mask=mask)
    # A product with the mask would turn a masked-out infinity into NaN.
    return torch.where(mask, values, 0.0).sum()
