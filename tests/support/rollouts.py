"""What tests of `RolloutDataModule` share: prompts, and stores that are sampled or made up."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samplers import Response, TransformersSampler
from erpd_lightning.data.store import Store
from support.policies import make_rows, write_rollouts
from support.trainers import run_prediction

GROUP_SIZE = 4

PROMPTS = [("3+4*2:", "4"), ("5-9-1:", "5"), ("7*8+1:", "7"), ("1+1:", "2"), ("2*2*2:", "8"), ("0-1+5:", "4")]


class Counting(TransformersSampler):
    """Counts the responses that were asked for."""

    drawn = 0

    def sample(self, *args: Any, **kwargs: Any) -> list[Response]:
        responses = super().sample(*args, **kwargs)
        Counting.drawn += len(responses)
        return responses


def sample(data: RolloutDataModule, policy: Path, ranks: Sequence[int] = (0,), world_size: int = 1) -> Store:
    """Sample on some ranks of a world, one after the other; rank 0, which finishes the store, comes last."""
    for rank in ranks:
        run_prediction(data.sampling(), policy, rank, world_size)
    return Store.open(data.store)


def write_made_up(path: Path, **changes: dict[int, Any]) -> list[dict[str, Any]]:
    """A store of three groups of four with some values changed by row; its rows."""
    rows = make_rows(groups=3, group_size=4)
    for column, values in changes.items():
        for row, value in values.items():
            rows[row][column] = value
    write_rollouts(path, rows)
    return rows
