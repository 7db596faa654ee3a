"""Strategies of Lightning's that a policy can be trained and sampled with, and steps that it can be trained in."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from ..errors import InvalidArgument, UserError, check_at_least
from ..processes import started_rank

REMEDY = "use ddp, or auto on one device"


def check_strategy(strategy: Strategy) -> None:
    """Refuse a strategy with which a policy would be trained wrongly, or lost.

    Subclasses are refused like strangers: what they change, nobody has tried.

    Raises:
        InvalidArgument: Names the strategy and what would do.
    """
    if type(strategy) is SingleDeviceStrategy:
        return
    name = type(strategy).__name__
    if type(strategy) is DDPStrategy:
        start_method = strategy._start_method
        if start_method in (None, "popen"):
            return
        name = f"{name} with start_method {start_method} (ddp_{start_method})"
    raise InvalidArgument("strategy", f"is {name}, which is not supported: {REMEDY}")


def check_steps(trainer: Any) -> None:
    """Refuse numbers that Lightning takes for something else, trains nothing with, or divides by when it validates.

    Raises:
        InvalidArgument: Names the trainer's argument.
    """
    clip = trainer.gradient_clip_val
    if clip is not None and not 0 <= clip < float("inf"):
        raise InvalidArgument("gradient_clip_val", f"is {clip}: it must be at least 0; null or 0 for no clipping")
    check_at_least(1, accumulate_grad_batches=trainer.accumulate_grad_batches)
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            raise InvalidArgument(name, "is 0: nothing would be trained")
    for name in ("check_val_every_n_epoch", "val_check_interval"):
        value = getattr(trainer, name)
        if isinstance(value, int | float) and value <= 0:
            raise InvalidArgument(name, f"is {value}: it must be above 0; limit_val_batches: 0 is for no validation")


def check_ranks(trainer: Any) -> None:
    """Refuse a trainer that takes this process for another one of the run than it was started as.

    Two processes that both take themselves for rank 0 would each train alone, and write over one another.

    Raises:
        UserError: Says which ranks or world sizes disagree.
    """
    rank, size = started_rank(), trainer.world_size
    if rank > 0 and trainer.global_rank == 0:
        raise UserError(
            f"this process was started as rank {rank}, but the trainer has {size} process(es) and takes it for rank 0: "
            "give every trainer as many devices and nodes as processes were started"
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        together = torch.distributed.get_world_size()
        if together > 1 and together != size:
            raise UserError(
                f"{together} processes run together, but the trainer has {size}: give every trainer as many "
                "devices and nodes"
            )


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuse environment variables of SLURM or torchrun that make no sense.

    Raises:
        UserError: Names the variable.
    """
    numbers = {}
    for name in ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if (text := environment.get(name)) is None:
            continue
        smallest = 1 if name in ("SLURM_NTASKS", "WORLD_SIZE") else 0
        if not (text.isascii() and text.isdigit() and int(text) >= smallest):
            raise UserError(f"the environment variable {name} is {text!r}: a number from {smallest} on is expected")
        numbers[name] = int(text)
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in numbers and size in numbers and numbers[rank] >= numbers[size]:
            raise UserError(
                f"the environment variable {rank} is {numbers[rank]}, but {size} is {numbers[size]}: it must be below"
            )
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_NTASKS" in numbers and "SLURM_PROCID" not in numbers and not interactive:
        raise UserError("the environment variable SLURM_NTASKS is set, but SLURM_PROCID is not: start with srun")
