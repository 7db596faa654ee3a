"""Rewards other than 0 and 1: what counts as correct, in evaluation, in logs and for the loss."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samplers import TransformersSampler
from erpd_lightning.data.store import Store
from erpd_lightning.data.verifiers import Verifier
from erpd_lightning.errors import UserError
from erpd_lightning.modules.evaluation import EvaluationModule
from erpd_lightning.modules.extreme_region import ExtremeRegionModule
from erpd_lightning.objectives.extreme import CrossEntropy
from support.policies import save_policy
from support.trainers import make_trainer


class Given(Verifier):
    """The same rewards again and again."""

    def __init__(self, *rewards: float | None) -> None:
        self.rewards = rewards

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        return [self.rewards[i % len(self.rewards)] for i in range(len(responses))]


class Outputs(Callback):
    """Notes which of the stored rows were trained on, and which of them were called correct."""

    def __init__(self) -> None:
        self.correct: dict[int, bool] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.correct.update(zip(batch.rows.tolist(), outputs["correct"].tolist(), strict=True))
        self.correct.pop(-1, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graded")
    save_policy(folder / "base")
    for name, first in (("train", "1"), ("validation", "2")):
        rows = [json.dumps({"prompt": f"{first}+{i}:", "answer": "1"}) + "\n" for i in range(4)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    return folder


def make_data(folder: Path, store: Path, *rewards: float | None, **settings: Any) -> RolloutDataModule:
    return RolloutDataModule(
        store,
        folder / "base",
        folder / "train.jsonl",
        folder / "validation.jsonl",
        sampler=TransformersSampler(6),
        verifier=Given(*rewards),
        group_size=4,
        validation_samples=4,
        **settings,
    )


@pytest.mark.parametrize(
    ("rewards", "threshold", "pass_at_1", "mean_reward", "unchecked"),
    [
        ((0.0, 1.0, 0.0, 0.0), 1.0, 0.25, 0.25, 0.0),
        ((-1.0, 1.0), 1.0, 0.5, 0.0, 0.0),
        ((0.5, 0.25, 2.0, 0.75), 1.0, 0.25, 0.875, 0.0),
        ((0.5, 0.25, 2.0, 0.75), 0.5, 0.75, 0.875, 0.0),
        ((-1.0, None, 1.0, None), 1.0, 0.25, 0.0, 0.5),
        # What could not be checked is not correct, also where its 0 in the store would be.
        ((-1.0, None, -0.5, None), -0.75, 0.25, -0.75, 0.5),
        ((None,), 1.0, 0.0, float("nan"), 1.0),
    ],
)
def test_evaluation(
    folder: Path,
    tmp_path: Path,
    rewards: tuple[float | None, ...],
    threshold: float,
    pass_at_1: float,
    mean_reward: float,
    unchecked: float,
) -> None:
    data = make_data(folder, tmp_path / "rollouts", *rewards, correct_threshold=threshold)
    (found,) = make_trainer().test(EvaluationModule(folder / "base"), datamodule=data, verbose=False)
    expected = {
        "pass@1": pass_at_1,
        "pass@k": float(pass_at_1 > 0),
        "mean_reward": mean_reward,
        "unchecked": unchecked,
    }
    assert {name: found[f"test/{name}"] for name in expected} == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("rewards", "threshold"),
    [
        ((-1.0, 1.0, -1.0, 1.0), 1.0),
        ((0.5, 0.25, 2.0, None), 0.5),
        ((-0.5, None, -2.0, 3.0), -1.0),
    ],
)
def test_cross_entropy_trains_on_what_is_correct(
    folder: Path, tmp_path: Path, rewards: tuple[float | None, ...], threshold: float, sign: int
) -> None:
    data = make_data(folder, tmp_path / "rollouts", *rewards, correct_threshold=threshold)
    module, seen = ExtremeRegionModule(folder / "base", objective=CrossEntropy(), sign=sign), Outputs()
    trainer = make_trainer(seen, max_epochs=1)
    trainer.fit(module, datamodule=data)
    correct = {row: reward >= threshold for row, reward in enumerate(rewards * 4) if reward is not None}
    assert seen.correct == {row: value for row, value in correct.items() if value == (sign == 1)}
    logged = {kind for kind in ("correct", "incorrect") if f"train/logp_{kind}" in trainer.callback_metrics}
    assert logged == {"correct" if sign == 1 else "incorrect"}


class EveryRow(CrossEntropy):
    """Also what could not be checked."""

    def select(self, rewards: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(rewards).bool()


@pytest.mark.parametrize("threshold", [1.0, 0.0, -1.0])
def test_what_could_not_be_checked_is_served_as_incorrect(folder: Path, tmp_path: Path, threshold: float) -> None:
    data = make_data(folder, tmp_path / "rollouts", None, threshold, correct_threshold=threshold)
    seen = Outputs()
    make_trainer(seen, max_epochs=1).fit(ExtremeRegionModule(folder / "base", objective=EveryRow()), datamodule=data)
    assert seen.correct == {row: row % 2 == 1 for row in range(16)}


def test_advantages_are_of_the_rewards_as_they_are(folder: Path, tmp_path: Path) -> None:
    data = make_data(folder, tmp_path / "rollouts", -1.0, 0.5, 2.0, 2.0)
    make_trainer(max_epochs=1).fit(ExtremeRegionModule(folder / "base"), datamodule=data)
    rewards = torch.tensor([-1.0, 0.5, 2.0, 2.0])
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    assert data.train_data.advantages.tolist() == pytest.approx((expected.tolist()) * 4, abs=1e-6)


def test_what_is_no_number_is_not_stored(folder: Path, tmp_path: Path) -> None:
    data = make_data(folder, tmp_path / "rollouts", 0.0, float("nan"))
    with pytest.raises(UserError, match=r"^Given gave nan as the reward of response 2"):
        make_trainer(max_epochs=1).fit(ExtremeRegionModule(folder / "base"), datamodule=data)
    assert not Store.exists(data.store)
    assert not list(data.store.glob("*.parquet"))


def test_a_threshold_is_a_number() -> None:
    with pytest.raises(UserError, match="correct_threshold is nan"):
        RolloutDataModule("r", "x", correct_threshold=float("nan"))
