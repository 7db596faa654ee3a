"""Which process this is among those that run together, and what they tell one another."""

from typing import Any, TypeVar

import torch

T = TypeVar("T")


def ranks(trainer: Any) -> tuple[int, int]:
    """This process among those that see different data: `(rank, world size)`."""
    kwargs = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    return kwargs["rank"], kwargs["num_replicas"]


def started_ranks() -> tuple[int, int]:
    """This process among those that were started so far: `(rank, world size)`.

    A trainer starts the others when it first runs something; until then this one is alone.
    """
    if not _together():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def gathered(value: T) -> list[T]:
    """What each of the processes that run together has, by rank; to be called on all of them."""
    if not _together():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _together() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
