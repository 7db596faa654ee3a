"""`RolloutDataModule`: advantages, what enters a loss, and the micro-batches of a step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler

from erpd_lightning.data.batching import RolloutTable
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.store import Store
from erpd_lightning.errors import UserError
from erpd_lightning.modules.distill import DistillModule
from erpd_lightning.modules.extreme_region import ExtremeRegionModule
from erpd_lightning.objectives.advantages import STD_OFFSET
from erpd_lightning.objectives.extreme import CrossEntropy
from support.policies import make_rows, write_rollouts
from support.rollouts import PROMPTS, Counting, write_made_up
from support.trainers import fake_trainer, make_trainer, score
from support.verifiers import Constant


@pytest.mark.parametrize(
    "key",
    [
        "group_size",
        "prompts_per_round",
        "round",
        "batch_size",
        "max_tokens",
        "validation_samples",
        "max_validation_prompts",
        "max_evaluation_prompts",
        "calibration_samples",
    ],
)
def test_counts_out_of_range(make_data: Callable[..., RolloutDataModule], key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key} is 0"):
        make_data(**{key: 0})


# Advantages, and what enters a loss


def test_advantages_leave_out_what_was_not_checked(make_data: Callable[..., RolloutDataModule], tmp_path: Path) -> None:
    rewards = dict(enumerate([1, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0]))
    # Of the last group the only correct one is not checked... so none is.
    checked = dict(enumerate([True, True, True, False, True, True, True, True, False, True, True, True]))
    write_made_up(tmp_path / "rollouts", reward=rewards, checked=checked)
    advantages = make_data().stored.advantages.tolist()
    three, four = (1 / 3) ** 0.5 + STD_OFFSET, (1 / 3) ** 0.5 + STD_OFFSET
    assert advantages[:4] == pytest.approx([2 / 3 / three, -1 / 3 / three, -1 / 3 / three, 0.0], rel=1e-6)
    assert advantages[4:8] == pytest.approx([0.5 / four] * 2 + [-0.5 / four] * 2, rel=1e-6)
    assert advantages[8:] == [0.0] * 4


class Rows(Callback):
    """Notes the rows of each optimiser step, padded sizes, and micro-batches."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = [[]]
        self.sizes: list[int] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.steps[-1] += [row for row in batch.rows.tolist() if row >= 0]
        self.sizes.append(batch.input_ids.numel())
        if batch.last:
            self.steps.append([])


@pytest.mark.parametrize(
    ("objective", "sign", "expected"),
    [
        (None, 1, {0, 1, 2, 4, 5, 6, 7}),
        (None, -1, {0, 1, 2, 4, 5, 6, 7}),
        (CrossEntropy(), 1, {0, 4, 5}),
        # What was not checked (3 and 8) is not incorrect either.
        (CrossEntropy(), -1, {1, 2, 6, 7, 9, 10, 11}),
    ],
)
def test_which_rows_are_trained_on(
    make_data: Callable[..., RolloutDataModule],
    policy: Path,
    tmp_path: Path,
    objective: Any,
    sign: int,
    expected: set[int],
) -> None:
    rewards = dict(enumerate([1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]))
    write_made_up(tmp_path / "rollouts", reward=rewards, checked={3: False, 8: False})
    module, seen = ExtremeRegionModule(policy, objective=objective, sign=sign), Rows()
    make_trainer(seen, max_epochs=2).fit(module, datamodule=make_data(batch_size=100))
    assert [sorted(step) for step in seen.steps] == [sorted(expected)] * 2 + [[]]


def test_epochs_are_shuffled_by_the_seed(
    make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path
) -> None:
    write_made_up(tmp_path / "rollouts")

    def steps(seed: int) -> list[set[int]]:
        seen = Rows()
        trainer = make_trainer(seen, max_epochs=2)
        trainer.fit(ExtremeRegionModule(policy), datamodule=make_data(batch_size=4, seed=seed))
        return [set(step) for step in seen.steps[:-1]]

    first = steps(0)
    assert set.union(*first[:3]) == set.union(*first[3:]) == set(range(12))
    assert first[:3] != first[3:]
    assert steps(0) == first != steps(1)


@pytest.mark.parametrize(
    ("reward", "threshold", "sign", "objective", "problem"),
    [
        (1.0, 1.0, 1, None, "all of 24 responses are correct; sample harder"),
        (0.0, 1.0, 1, None, "none of 24 responses is correct; sample easier"),
        (0.0, 1.0, 1, CrossEntropy(), "none of 24 responses is correct; sample easier"),
        (0.5, 0.75, 1, CrossEntropy(), "none of 24 responses is correct; sample easier"),
        (0.5, 0.25, -1, CrossEntropy(), "all of 24 responses are correct; sample harder"),
        (-1.0, -1.0, 1, None, "all of 24 responses are correct; sample harder"),
        (None, 1.0, 1, None, "none of 24 responses could be checked; look at"),
        (None, -1.0, 1, CrossEntropy(), "none of 24 responses could be checked; look at"),
    ],
)
def test_nothing_to_learn_from(
    make_data: Callable[..., RolloutDataModule],
    policy: Path,
    reward: float | None,
    threshold: float,
    sign: int,
    objective: Any,
    problem: str,
) -> None:
    module = ExtremeRegionModule(policy, objective=objective, sign=sign)
    data = make_data(verifier=Constant(reward), correct_threshold=threshold)
    with pytest.raises(UserError, match=f"no response enters the loss: {problem}"):
        make_trainer(max_epochs=1).fit(module, datamodule=data)
    # Nothing that was finished is lost.
    assert Store.open(data.store).rows == 24


def test_nothing_was_checked(make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path) -> None:
    write_made_up(tmp_path / "rollouts", checked=dict.fromkeys(range(12), False))
    with pytest.raises(UserError, match="no response enters the loss: none of 12 responses could be checked"):
        make_trainer(max_epochs=1).fit(ExtremeRegionModule(policy), datamodule=make_data())


def test_groups_that_are_alike(make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path) -> None:
    rows = [{**row, "reward": float(row["group"] == 1), "checked": row["sample"] > 0} for row in make_rows(groups=3)]
    write_rollouts(tmp_path / "rollouts", rows)
    problem = r"no group has both correct and incorrect answers \(33% of 9 responses that could be checked, of 12, are "
    with pytest.raises(UserError, match=problem):
        make_trainer(max_epochs=1).fit(ExtremeRegionModule(policy), datamodule=make_data())


def test_a_group_of_one(make_data: Callable[..., RolloutDataModule], policy: Path) -> None:
    Counting.drawn = 0
    data = make_data(group_size=1, sampler=Counting(8, batch_size=8), verifier=Constant(1.0))
    with pytest.raises(UserError, match=r"^group_size is 1"):
        make_trainer(max_epochs=1).fit(ExtremeRegionModule(policy), datamodule=data)
    assert Counting.drawn == 0
    make_trainer(max_epochs=1).fit(ExtremeRegionModule(policy, objective=CrossEntropy()), datamodule=data)
    assert Counting.drawn == len(PROMPTS)


# Micro-batches


def fewest_runs(lengths: list[int], most: int) -> int:
    """Runs of the lengths, longest first, whose count times longest length is at most `most`."""
    runs = count = longest = 0
    for length in sorted(lengths, reverse=True):
        if count and (count + 1) * longest <= most:
            count += 1
        else:
            runs, count, longest = runs + 1, 1, length
    return runs


@pytest.mark.parametrize(("max_tokens", "wanted"), [(10_000, 1), (60, 1), (24, 1), (60, 7)])
def test_accumulation_is_raised_to_what_max_tokens_needs(
    make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path, max_tokens: int, wanted: int
) -> None:
    rows = write_made_up(tmp_path / "rollouts")
    lengths = [len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows]
    longest_five = sorted(lengths)[-5:]
    needed = fewest_runs(longest_five, max_tokens)
    assert (needed > 1) == (max_tokens < 100)
    seen = Rows()
    trainer = make_trainer(seen, max_epochs=1, accumulate_grad_batches=wanted)
    data = make_data(batch_size=5, max_tokens=max_tokens)
    trainer.fit(ExtremeRegionModule(policy), datamodule=data)
    assert trainer.accumulate_grad_batches == max(needed, wanted)
    assert trainer.global_step == 3
    assert [len(step) for step in seen.steps] == [5, 5, 2, 0]
    assert max(seen.sizes) <= max_tokens
    assert len(seen.sizes) == 3 * max(needed, wanted)


def test_ranks_share_the_micro_batches(
    make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path
) -> None:
    rows = write_made_up(tmp_path / "rollouts")
    lengths = [len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows]
    needed = fewest_runs(sorted(lengths)[-6:], 40)
    assert needed > 2
    taken = []
    for rank in range(2):
        data = make_data(batch_size=6, max_tokens=40)
        data.trainer = fake_trainer(rank, 2)
        batches = list(data.train_dataloader())
        assert data.trainer.accumulate_grad_batches == -(-needed // 2)
        assert len(batches) == 2 * -(-needed // 2)
        taken.append([row for batch in batches for row in batch.rows.tolist() if row >= 0])
    assert sorted(taken[0] + taken[1]) == list(range(12))


def test_a_response_longer_than_max_tokens(
    make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path
) -> None:
    write_made_up(tmp_path / "rollouts")
    with pytest.raises(UserError, match="max_tokens is 5"):
        make_trainer(max_epochs=1).fit(ExtremeRegionModule(policy), datamodule=make_data(max_tokens=5))


def test_one_data_module_serves_all_stages(
    make_data: Callable[..., RolloutDataModule], policy: Path, other_policy: Path, tmp_path: Path
) -> None:
    """Scores that were made after the rollouts were first read are seen."""
    data = make_data(scores=tmp_path / "scores", calibration_prompts=0)
    make_trainer(max_epochs=1).fit(ExtremeRegionModule(policy), datamodule=data)
    assert data.rollouts.scores == {}
    student = DistillModule(policy, kl_budget=0.01)
    with pytest.raises(UserError, match="needs rollouts with scores"):
        make_trainer(max_epochs=1).fit(student, datamodule=data)
    score(data, "base", policy)
    score(data, "teacher", other_policy)
    with pytest.raises(UserError, match="unlearned, which were not scored; there are base, teacher"):
        make_trainer(max_epochs=1).fit(student, datamodule=data)
    score(data, "unlearned", policy)
    make_trainer(max_epochs=1).fit(student, datamodule=data)
    assert student.beta is not None
    assert isinstance(data.rollouts, RolloutTable)


# Whole steps


class Steps(Callback):
    """Tokens of each optimiser step: those that were trained on, and those that its loss is divided by."""

    def __init__(self) -> None:
        self.tokens: list[tuple[int, int]] = []
        self._seen = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._seen += int(batch.mask.sum())
        if batch.last:
            self.tokens.append((self._seen, batch.step_tokens))
            self._seen = 0


@pytest.mark.parametrize("limit", [3, 0.4])
def test_an_epoch_does_not_end_inside_a_step(
    make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path, limit: float
) -> None:
    write_made_up(tmp_path / "rollouts")
    data = make_data(batch_size=8, max_tokens=20)
    with pytest.raises(UserError, match=r"limit_train_batches .* is .* optimiser step takes \d+; take a multiple"):
        make_trainer(max_epochs=1, limit_train_batches=limit).fit(ExtremeRegionModule(policy), datamodule=data)


def test_validations_are_not_further_apart_than_an_epoch_is_long(
    make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path
) -> None:
    write_made_up(tmp_path / "rollouts")
    data = make_data(batch_size=4)
    with pytest.raises(UserError, match=r"val_check_interval is 1000, but an epoch has only \d+ micro-batches"):
        make_trainer(max_epochs=1, val_check_interval=1000).fit(ExtremeRegionModule(policy), datamodule=data)


def test_a_callback_does_not_change_what_a_step_is(
    make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path
) -> None:
    """Each of its steps would be the sum of several, each divided by tokens of its own."""
    write_made_up(tmp_path / "rollouts")
    trainer = make_trainer(GradientAccumulationScheduler({1: 3}), max_epochs=2)
    with pytest.raises(
        UserError, match=r"accumulate_grad_batches was set to 3 in training, .* step is 1 micro-batches"
    ):
        trainer.fit(ExtremeRegionModule(policy), datamodule=make_data(batch_size=4))
    assert trainer.current_epoch == 1


@pytest.mark.parametrize("settings", [{"max_epochs": 1, "limit_train_batches": 1.0}, {"fast_dev_run": 1}])
def test_steps_are_whole(
    make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    write_made_up(tmp_path / "rollouts")
    seen = Steps()
    trainer = make_trainer(seen, **settings)
    trainer.fit(ExtremeRegionModule(policy), datamodule=make_data(batch_size=8, max_tokens=20))
    assert trainer.accumulate_grad_batches > 1
    assert len(seen.tokens) == trainer.global_step > 0
    assert all(trained == divided for trained, divided in seen.tokens)
