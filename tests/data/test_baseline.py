"""What the reward of a response is compared with: its group, or all that were sampled together with it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.errors import UserError
from erpd_lightning.modules.extreme_region import ExtremeRegionModule
from erpd_lightning.objectives import CrossEntropy
from support import reference
from support.chain import DEMO
from support.policies import make_rows, save_policy, write_rollouts
from support.trainers import make_trainer
from test_configs import fit

ROUNDS = ("now", "before")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts of two rounds, of 3 and 5 prompts: all answers to the first are incorrect; one could not be checked."""
    folder = tmp_path_factory.mktemp("baseline")
    save_policy(folder / "base")
    for number, name in enumerate(ROUNDS):
        rows = make_rows(groups=3 + 2 * number, seed=number)
        for row in rows[:4]:
            row["reward"] = 0.0
        rows[-1]["checked"] = number == 0
        write_rollouts(folder / name, rows)
    return folder


def make_data(folder: Path, **settings: Any) -> RolloutDataModule:
    return RolloutDataModule(folder / "now", tokenizer=folder / "base", replay_stores=[folder / "before"], **settings)


def test_advantages_over_the_batch_agree_with_reference(folder: Path) -> None:
    """Each round's rollouts have a baseline of their own; what could not be checked is no part of it."""
    data = make_data(folder, replay=1, baseline="batch")
    expected = torch.zeros(12 + 20)
    for store in (slice(0, 12), slice(12, 31)):
        rewards = data.rollouts.rewards[store]
        expected[store] = torch.from_numpy(reference.group_advantages(rewards, [0] * len(rewards)))
    assert data.stored.advantages.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert data.stored.advantages[:12].mean().abs() < 1e-6
    assert data.stored.advantages[31] == 0


@pytest.mark.parametrize(("baseline", "responses"), [("group", 8), ("batch", 12)])
def test_incorrect_answers_alone_teach_beside_the_batch(folder: Path, baseline: Any, responses: int) -> None:
    data = make_data(folder, baseline=baseline)
    assert (data.stored.advantages[:4] < 0).tolist() == [baseline == "batch"] * 4
    module = ExtremeRegionModule(folder / "base", learning_rate=0.01, warmup_steps=0)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=data)
    assert sum(len(batch.rewards) for batch in data.train_dataloader()) == responses


def test_one_response_to_a_prompt_takes_the_batch(folder: Path) -> None:
    module = ExtremeRegionModule(folder / "base")
    make_data(folder, group_size=1, baseline="batch").check_groups(module.needs_groups)
    make_data(folder, group_size=1).check_groups(
        ExtremeRegionModule(folder / "base", objective=CrossEntropy()).needs_groups
    )
    with pytest.raises(UserError, match=r"^group_size is 1: .* takes at least 2 \(or baseline: batch\)"):
        make_data(folder, group_size=1).check_groups(module.needs_groups)


def test_another_value(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^baseline is 'mean': it must be 'group' or 'batch'"):
        make_data(folder, baseline="mean")


def test_equal_rewards(folder: Path, tmp_path: Path) -> None:
    write_rollouts(tmp_path / "incorrect", [{**row, "reward": 0.0} for row in make_rows()])
    data = RolloutDataModule(tmp_path / "incorrect", tokenizer=folder / "base", baseline="batch")
    with pytest.raises(UserError, match=r"no response enters the loss: none of 16 responses is correct"):
        make_trainer(max_epochs=1).fit(ExtremeRegionModule(folder / "base"), datamodule=data)


def test_what_depends_on_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Teacher and unlearned policy, and neither the rollouts nor what is distilled."""
    builder = fit(monkeypatch, "--config", DEMO, "--run_dir", tmp_path, "--data.baseline=batch").builder
    stages = ("rollouts", "extreme_region", "unlearned", "scoring", "distill", "evaluation")
    found = {stage: builder.settings(stage)["data"].get("baseline") for stage in stages}
    assert {stage: how for stage, how in found.items() if how} == {"extreme_region": "batch", "unlearned": "batch"}


def test_what_depends_on_the_threshold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is trained on correct responses, or judged by their share; the rollouts hold the rewards as they are."""
    builder = fit(monkeypatch, "--config", DEMO, "--run_dir", tmp_path, "--data.correct_threshold=0.5").builder
    stages = ("rollouts", "extreme_region", "unlearned", "scoring", "signal_selection", "distill", "evaluation")
    found = {stage for stage in stages if builder.settings(stage)["data"].get("correct_threshold") == 0.5}
    assert found == {"extreme_region", "unlearned", "signal_selection", "evaluation"}
