"""Replay: rollouts of earlier rounds that are trained on again."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from erpd_lightning.callbacks import KLBudget
from erpd_lightning.cli.main import ERPDCLI
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samplers import TransformersSampler
from erpd_lightning.data.store import Store
from erpd_lightning.errors import UserError
from erpd_lightning.modules.extreme_region import ExtremeRegionModule
from support.chain import arguments
from support.kills import CHECKPOINT, MODULE, Kill, written
from support.policies import make_rows, save_policy, write_prompts, write_rollouts
from support.runs import Runs, contents
from support.trainers import make_trainer

ROUNDS = ("now", "before", "first")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base policy, and rollouts of three rounds, of 2, 3 and 4 prompts; of the last, one could not be checked."""
    folder = tmp_path_factory.mktemp("replay")
    save_policy(folder / "base")
    for number, name in enumerate(ROUNDS):
        rows = make_rows(groups=2 + number, seed=number)
        rows[-1]["checked"] = number < 2
        write_rollouts(folder / name, rows)
    write_prompts(folder / "prompts.jsonl", [("1+1:", "2"), ("3-2:", "1")])
    return folder


def make_data(folder: Path, store: str = "now", earlier: Sequence[str] = ROUNDS[1:], **how: Any) -> RolloutDataModule:
    stores = [folder / name for name in earlier]
    settings: dict[str, Any] = {"replay_stores": stores, "batch_size": 64, **how}
    return RolloutDataModule(folder / store, tokenizer=folder / "base", **settings)


def train(folder: Path, data: RolloutDataModule, *callbacks: Any) -> tuple[dict[str, torch.Tensor], Trainer]:
    module = ExtremeRegionModule(folder / "base", learning_rate=0.01, warmup_steps=0)
    trainer = make_trainer(*callbacks, max_epochs=2)
    trainer.fit(module, datamodule=data)
    return module.policy.state_dict(), trainer


@pytest.mark.parametrize(("replay", "names"), [(0, ROUNDS[:1]), (1, ROUNDS[:2]), (2, ROUNDS), (9, ROUNDS)])
def test_what_is_trained_on(folder: Path, replay: int, names: Sequence[str]) -> None:
    """The round's own rollouts first, and of every round what it would be alone."""
    data = make_data(folder, replay=replay)
    alone = [make_data(folder, name, replay_stores=[]) for name in names]
    assert torch.equal(data.rollouts.rewards, torch.cat([part.rollouts.rewards for part in alone]))
    assert torch.equal(data.rollouts.logps, torch.cat([part.rollouts.logps for part in alone]))
    assert torch.equal(data.stored.advantages, torch.cat([part.stored.advantages for part in alone]))
    assert torch.equal(data.stored.outcomes.checked, torch.cat([part.stored.outcomes.checked for part in alone]))
    assert len(set(data.rollouts.groups.tolist())) == sum(2 + number for number in range(len(names)))


def test_what_is_scored_and_distilled_is_of_this_round(folder: Path) -> None:
    data = make_data(folder, replay=2, scores=folder / "scoring")
    assert len(data.rollouts.rewards) == len(data.stored.outcomes.checked) == 8


def test_training_is_as_on_one_store_of_all(folder: Path, tmp_path: Path) -> None:
    rows = [
        {**row, "group": row["group"] + 10 * number}
        for number, name in enumerate(ROUNDS)
        for row in Store.open(folder / name).table().to_pylist()
    ]
    write_rollouts(tmp_path / "all", rows)
    replayed, _ = train(folder, make_data(folder, replay=2))
    together, _ = train(folder, RolloutDataModule(tmp_path / "all", tokenizer=folder / "base", batch_size=64))
    alone, _ = train(folder, make_data(folder))
    assert all(torch.equal(value, together[name]) for name, value in replayed.items())
    assert not all(torch.equal(value, alone[name]) for name, value in replayed.items())


@pytest.mark.parametrize("replay", [0, 1])
def test_a_budget_takes_no_estimate_from_the_samples_of_others(folder: Path, replay: int) -> None:
    """Their log-ratios are to the policies that sampled them."""
    budget = KLBudget(budget=1000.0, prompts=folder / "prompts.jsonl", max_prompts=2, sampler=TransformersSampler(8))
    _, trainer = train(folder, make_data(folder, replay=replay), budget)
    assert ("kl_budget/estimate" in trainer.callback_metrics) == (replay == 0)


def test_an_altered_store_is_noticed(folder: Path, tmp_path: Path) -> None:
    write_rollouts(tmp_path / "before", make_rows())
    (tmp_path / "before" / "part-00000.parquet").write_bytes(b"altered")
    data = RolloutDataModule(folder / "now", tokenizer=folder / "base", replay_stores=[tmp_path / "before"], replay=1)
    with pytest.raises(UserError, match="was altered or truncated"):
        _ = data.rollouts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replay": -1}, "^replay is -1: it must be at least 0"),
        ({"replay": 1, "iterations": 2}, r"^replay is 1, but iterations \(2\) is above 1"),
    ],
)
def test_values_out_of_range(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_data(folder, **settings)


def test_an_estimate_of_the_kl_from_the_samples_of_others(folder: Path) -> None:
    module = ExtremeRegionModule(folder / "base", kl_coef=0.1, kl_estimator="k2")
    module.check_rollouts(make_data(folder))
    with pytest.raises(UserError, match=r"kl_estimator is k2, .* with replay some are those of the base policies"):
        module.check_rollouts(make_data(folder, replay=1))


def test_in_the_chain(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs no rollouts, each round replays those before it, and a killed run ends with the same weights."""
    extra = {"rounds": 2, "data.replay": 3}
    alone, killed = (arguments(tmp_path / name, **extra) for name in ("alone", "killed"))
    runs.run(alone)
    kills = (
        Kill(f"{MODULE}.export", count=4),  # the base policy's, and the three of the first round
        written(f"round-2/extreme_region/checkpoints/{CHECKPOINT}", count=2),
        written("round-2/unlearned/stage.json"),
    )
    runs.run_killed(killed, kills)
    assert contents(tmp_path / "killed") == contents(tmp_path / "alone")
    records = {
        (number, stage): json.loads((tmp_path / "alone" / f"round-{number}" / stage / "stage.json").read_text())
        for number in (1, 2)
        for stage in ("extreme_region", "unlearned", "scoring", "distill")
    }
    assert {place for place, record in records.items() if "replayed" in record["inputs"]} == {
        (2, "extreme_region"),
        (2, "unlearned"),
    }
    assert {stage for (_, stage), record in records.items() if "replay" in record["settings"]["data"]} == {
        "extreme_region",
        "unlearned",
    }
    rounds = json.loads((tmp_path / "alone" / "summary.json").read_text())["rounds"]
    assert [(entry["rollouts"], entry["rollouts_total"]) for entry in rounds] == [(128, 128), (128, 256)]
    monkeypatch.setattr("sys.argv", ["erpd_lightning"])
    with pytest.raises(UserError, match=r"extreme_region was made with data.replay: 3, not 0"):
        ERPDCLI(args=arguments(tmp_path / "alone", rounds=2))
