"""An objective of the user's, in a file of its own: found by its class path, configured, and trained with."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from erpd_lightning.cli.main import main
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.pipeline.rounds import Rounds
from support.chain import DEMO
from support.policies import make_rows, save_policy, write_rollouts
from support.trainers import fake_trainer, make_trainer

MY_FILE = '''
from dataclasses import dataclass

from torch import Tensor

from erpd_lightning.objectives.distillation import TokenObjective
from erpd_lightning.objectives.extreme import ExtremeObjective


class MyObjective(ExtremeObjective):
    """Mean log-prob of a response against its reward.

    Args:
        scale: Weight of it.
    """

    per = "response"
    needs_groups = False

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def select(self, rewards: Tensor, advantages: Tensor) -> Tensor:
        return rewards >= 0

    def __call__(
        self, logps: Tensor, old_logps: Tensor, mask: Tensor, rewards: Tensor, advantages: Tensor
    ) -> Tensor:
        return -self.scale * rewards * logps.where(mask, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)


@dataclass
class MyDataclass(MyObjective):
    """The same as a dataclass.

    Args:
        scale: Weight of it.
    """

    scale: float = 1.0


@dataclass
class MyTokenObjective(TokenObjective):
    """Signal times log-prob.

    Args:
        scale: Weight of it.
    """

    scale: float = 1.0

    def __call__(
        self, logps: Tensor, old_logps: Tensor, sampler_logps: Tensor, signal: Tensor, kl: Tensor, beta: float
    ) -> Tensor:
        return beta * kl - self.scale * signal * logps
'''

both_kinds = pytest.mark.parametrize("kind", ["MyObjective", "MyDataclass"])


def own(kind: str) -> list[str]:
    return ["--extreme_region.objective", f"my_file.{kind}", "--extreme_region.objective.scale", "3"]


@pytest.fixture
def my_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file where `python -m` looks for it."""
    (tmp_path / "my_file.py").write_text(MY_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_file", None)


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["erpd_lightning", "fit", "--config", *map(str, args)])
    main()


@both_kinds
@pytest.mark.usefixtures("my_file")
def test_the_command_line_finds_it(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, DEMO, *own(kind), "--print_config")
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    found = yaml.safe_load(printed.out)["extreme_region"]["objective"]
    assert found == {"class_path": f"my_file.{kind}", "init_args": {"scale": 3.0}}


@pytest.mark.usefixtures("my_file")
def test_one_of_the_distillation_stage_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chains: list[Rounds] = []
    monkeypatch.setattr(Rounds, "run", lambda self: chains.append(self))
    settings = ["--distill.objective", "my_file.MyTokenObjective", "--distill.objective.scale", "2"]
    call(monkeypatch, DEMO, "--run_dir", tmp_path / "run", *settings)
    objective: Any = chains[0].builder.module("distill", policy="p").objective
    assert (type(objective).__name__, objective.scale, objective.needs) == ("MyTokenObjective", 2.0, "tokens")


@both_kinds
@pytest.mark.usefixtures("my_file")
def test_a_step_is_trained_with_it(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chains: list[Rounds] = []
    monkeypatch.setattr(Rounds, "run", lambda self: chains.append(self))
    call(monkeypatch, DEMO, "--run_dir", tmp_path / "run", *own(kind))
    rows = make_rows()
    write_rollouts(tmp_path / "rollouts", rows)
    policy = save_policy(tmp_path / "base")
    module: Any = chains[0].builder.module("extreme_region", policy=str(policy))
    assert type(module.objective).__name__ == kind
    data = RolloutDataModule(tmp_path / "rollouts", policy, batch_size=100, max_tokens=60)
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, datamodule=data)
    loss = float(trainer.callback_metrics["train/loss"])

    fresh: Any = chains[0].builder.module("extreme_region", policy=str(policy))
    fresh.configure_model()
    data = RolloutDataModule(tmp_path / "rollouts", policy, batch_size=100)
    data.trainer = fake_trainer()
    (batch,) = data.train_dataloader()
    with torch.no_grad():
        logps = fresh.policy.token_logps(batch).logps
    means = [float(logps[b][batch.mask[b]].mean()) for b in range(len(rows))]
    expected = -3 * sum(m * float(r) for m, r in zip(means, batch.rewards, strict=True)) / len(rows)
    assert loss == pytest.approx(expected, rel=1e-4)
