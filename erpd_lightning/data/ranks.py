"""Which process this is among those that see different data."""

from typing import Any


def ranks(trainer: Any) -> tuple[int, int]:
    """This process among those that see different data: `(rank, world size)`."""
    kwargs = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    return kwargs["rank"], kwargs["num_replicas"]
