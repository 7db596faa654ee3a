"""Advantages from rewards."""

import torch
from torch import Tensor

from .shapes import check_shape

# Added to the standard deviation, as TRL does: bounds the advantage in groups that hardly vary.
STD_OFFSET = 1e-4


def group_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """GRPO advantages `(R - mean_G) / (std_G + 1e-4)`: float32 `(N,)`.

    Source: arXiv 2402.03300, with the offset and Bessel's correction of TRL. Groups whose rewards
    are all equal, groups of one member among them, get exactly 0. With all responses of a batch as one
    group they are the advantages of REINFORCE++, arXiv 2501.03262, without its KL in the reward.

    Args:
        rewards: `(N,)`.
        groups: `(N,)` long ids; equal ids are one group, in any order.

    Raises:
        ValueError: for rewards and groups of other shapes.

    Example:
        >>> group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([7, 7, 8, 8]))
        tensor([ 0.7070, -0.7070,  0.0000,  0.0000])
    """
    check_shape((None,), rewards=rewards)
    check_shape(rewards.shape, groups=groups)
    ids, index = torch.unique(groups, return_inverse=True)
    rewards = rewards.double()
    zeros = rewards.new_zeros(len(ids))

    def reduce(values: Tensor, how: str) -> Tensor:
        return zeros.scatter_reduce(0, index, values, how, include_self=False)

    size = reduce(torch.ones_like(rewards), "sum")
    deviation = rewards - reduce(rewards, "mean")[index]
    std = (reduce(deviation.square(), "sum") / (size - 1).clamp(min=1)).sqrt()
    # Asked of the rewards themselves: the mean of equal rewards may differ from them by rounding.
    varies = reduce(rewards, "amin") < reduce(rewards, "amax")
    return torch.where(varies[index], deviation / (std[index] + STD_OFFSET), 0.0).float()
