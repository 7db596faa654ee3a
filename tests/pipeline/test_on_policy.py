"""On-policy training: the round's prompts in parts, each answered by the policy as it is when its turn comes."""

import copy
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samplers import TransformersSampler
from erpd_lightning.data.store import Store
from erpd_lightning.data.verifiers import Verifier
from erpd_lightning.errors import UserError
from erpd_lightning.modules.extreme_region import ExtremeRegionModule
from support.chain import arguments
from support.kills import CHECKPOINT, MODULE, Kill, after, written
from support.policies import save_policy, token_logps, write_prompts
from support.runs import Runs, contents
from support.trainers import make_trainer
from support.verifiers import Constant

PROMPTS = ["1+1=", "2*3-1=", "4-1=", "5*2+3=", "7+2="]
ITERATIONS = 3
ROUNDED = (0, 1, 3, 5)
"""Where the parts of five prompts begin and end."""


class EvenSum(Verifier):
    """Correct is what has an even sum of characters: a coin flip for a policy that knows nothing."""

    def __call__(self, responses: Any, answers: Any) -> list[float | None]:
        return [float(sum(map(ord, response)) % 2 == 0) for response in responses]


class Watch(Callback):
    """Notes the weights at the start of each epoch and the rows of each optimiser step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.steps: list[tuple[int, set[int]]] = []

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.weights.append(copy.deepcopy(module.policy.model.state_dict()))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append((trainer.current_epoch, set(batch.rows.tolist())))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy") / "base")


@pytest.fixture
def make_data(tmp_path: Path, policy: Path) -> Callable[..., RolloutDataModule]:
    prompts = write_prompts(tmp_path / "prompts.jsonl", [(prompt, "?") for prompt in PROMPTS])

    def make(**settings: Any) -> RolloutDataModule:
        defaults: dict[str, Any] = {
            "tokenizer": policy,
            "prompts": prompts,
            "sampler": TransformersSampler(6, batch_size=16),
            "verifier": EvenSum(),
            "group_size": 8,
            "iterations": ITERATIONS,
        }
        return RolloutDataModule(tmp_path / "rollouts", **{**defaults, **settings})

    return make


def fit(policy: Path, data: RolloutDataModule, **settings: Any) -> Watch:
    watch = Watch()
    module = ExtremeRegionModule(policy, learning_rate=0.01, warmup_steps=0)
    make_trainer(watch, **settings).fit(module, datamodule=data)
    return watch


def test_each_part_is_answered_by_the_policy_of_its_time(
    policy: Path, make_data: Callable[..., RolloutDataModule]
) -> None:
    data = make_data()
    watch = fit(policy, data, max_epochs=2 * ITERATIONS)
    model = ExtremeRegionModule(policy)
    model.configure_model()
    seen = []
    for number, path in enumerate(data.train_data.stores):
        rows = Store.open(path).table().to_pylist()
        seen.append(sorted({row["prompt"] for row in rows}))
        for weights, fits in ((watch.weights[2 * number], True), (watch.weights[2 * number - 1], False)):
            model.policy.model.load_state_dict(weights)
            model.policy.eval()
            differences = [
                abs(logp - float(found[token]))
                for row in rows
                for logp, found, token in zip(
                    row["logps"],
                    token_logps(model.policy.model, row["prompt_ids"], row["response_ids"]).detach(),
                    row["response_ids"],
                    strict=True,
                )
            ]
            assert (max(differences) < 1e-3) == fits
    assert seen == [sorted(PROMPTS[a:b]) for a, b in pairwise(ROUNDED)]


def test_each_part_is_trained_on_for_as_many_epochs(policy: Path, make_data: Callable[..., RolloutDataModule]) -> None:
    data = make_data()
    watch = fit(policy, data, max_epochs=2 * ITERATIONS)
    by_epoch: list[set[int]] = [set() for _ in range(2 * ITERATIONS)]
    for epoch, rows in watch.steps:
        by_epoch[epoch] |= rows
    for number, path in enumerate(data.train_data.stores):
        table = Store.open(path).table().to_pylist()
        groups: dict[int, list[float]] = {}
        for row in table:
            groups.setdefault(row["group"], []).append(row["reward"])
        informative = {n for n, row in enumerate(table) if len(set(groups[row["group"]])) > 1}
        assert informative
        assert by_epoch[2 * number] == by_epoch[2 * number + 1] == informative


def test_a_part_that_teaches_nothing_is_a_step_all_the_same(
    policy: Path, make_data: Callable[..., RolloutDataModule]
) -> None:
    watch = fit(policy, make_data(verifier=Constant(0.0)), max_epochs=ITERATIONS)
    assert len(watch.steps) == ITERATIONS
    assert all(torch.equal(value, watch.weights[0][name]) for name, value in watch.weights[-1].items())


@pytest.mark.parametrize("settings", [{"max_epochs": 4}, {"max_epochs": -1, "max_steps": 9}])
def test_epochs_that_cannot_be_shared_out(
    policy: Path, make_data: Callable[..., RolloutDataModule], settings: dict[str, int]
) -> None:
    with pytest.raises(UserError, match=r"must be a multiple of iterations \(3\)"):
        fit(policy, make_data(), **settings)


def test_a_fast_dev_run(policy: Path, make_data: Callable[..., RolloutDataModule]) -> None:
    assert len(fit(policy, make_data(), fast_dev_run=True).steps) == 1


# The chain

OVERRIDES: dict[str, Any] = {
    "last_stage": "extreme_region",
    "data.iterations": 4,
    "data.batch_size": 8,
    "data.max_tokens": 64,
    "extreme_region_trainer.max_epochs": 8,
}

KILLS = [
    written(r"round-1/rollouts/iteration-0001/part-00000\.parquet"),
    written("iteration-0003/manifest.json"),
    after(written("iteration-0003/manifest.json")),
    Kill(f"{MODULE}.training_step", count=3),
    after(written("iteration-0004/manifest.json")),
    written(CHECKPOINT),
    Kill(f"{MODULE}.export"),
]


def test_killed_at_any_point_it_ends_the_same(runs: Runs, tmp_path: Path) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    steps, printed = runs.run(arguments(alone, **OVERRIDES))
    assert "training the student on its own fresh rollouts" in printed
    runs.run_killed(arguments(killed, **OVERRIDES), KILLS)
    assert contents(killed) == contents(alone)
    assert len(set(steps)) > 8
    (entry,) = json.loads((alone / "summary.json").read_text())["rounds"]
    assert entry["rollouts"] == 16 * 8
    assert list(entry["policies"]) == ["base", "student"]


def test_two_processes(runs: Runs, tmp_path: Path) -> None:
    two = {"trainer.devices": 2, "trainer.strategy": "ddp", **OVERRIDES}
    runs.run(arguments(tmp_path / "two", **two), processes=2)
    (entry,) = json.loads((tmp_path / "two" / "summary.json").read_text())["rounds"]
    assert entry["rollouts"] == 16 * 8
