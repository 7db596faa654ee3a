"""`TrainLoader`: going on from a checkpoint in the middle of an epoch, in steps that are cut as they were."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.train_loader import TrainLoader
from erpd_lightning.data.train_rollouts import TrainRollouts, select_all
from erpd_lightning.errors import UserError
from support.rollouts import write_made_up
from support.trainers import fake_trainer


def loading(make_data: Callable[..., RolloutDataModule], **settings: Any) -> RolloutDataModule:
    data = make_data(batch_size=4, **{"max_tokens": 30, **settings})
    data.trainer = fake_trainer()
    return data


@pytest.mark.parametrize("state_first", [True, False])
def test_it_goes_on_in_the_middle_of_an_epoch(
    make_data: Callable[..., RolloutDataModule], tmp_path: Path, state_first: bool
) -> None:
    write_made_up(tmp_path / "rollouts")
    whole = [batch.rows.tolist() for batch in loading(make_data).train_dataloader()]
    assert len(whole) == 6
    data = loading(make_data)
    assert data.state_dict() == {}
    assert [batch.rows.tolist() for batch in islice(data.train_dataloader(), 3)] == whole[:3]
    resumed = loading(make_data)
    if state_first:
        resumed.load_state_dict(data.state_dict())
    loader = resumed.train_dataloader()
    if not state_first:
        resumed.load_state_dict(data.state_dict())
    assert [batch.rows.tolist() for batch in loader] == whole[3:]


def test_steps_that_are_cut_otherwise_are_refused(make_data: Callable[..., RolloutDataModule], tmp_path: Path) -> None:
    write_made_up(tmp_path / "rollouts")
    data = loading(make_data, max_tokens=24)
    data.train_dataloader()
    resumed = loading(make_data, max_tokens=10_000)
    resumed.load_state_dict(data.state_dict())
    with pytest.raises(UserError, match=r"saved with [2-9] micro-batches of a process in a step, there are 1 now"):
        resumed.train_dataloader()


def test_the_state_of_another_iteration_waits_for_it(tmp_path: Path) -> None:
    write_made_up(tmp_path / "rollouts")
    rollouts = TrainRollouts([tmp_path / "rollouts"], None, "group")
    loader = TrainLoader()
    loader.load_state_dict({"epoch": 0, "batches": 5, "micro_batches": 7, "iteration": 2}, iterations=2)
    sizes = {"batch_size": 4, "max_tokens": 60, "seed": 0}
    assert loader.make(fake_trainer(), rollouts, select_all, **sizes).state_dict() == {"epoch": 0, "batches": 0}
    # As many micro-batches as then, which the iteration before may not have needed.
    assert loader.state_dict() == {"epoch": 0, "batches": 0, "micro_batches": 7, "iteration": 1}
    rollouts.iteration = 2
    assert loader.make(fake_trainer(), rollouts, select_all, **sizes).state_dict() == {"epoch": 0, "batches": 5}
