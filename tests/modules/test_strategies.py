"""Strategies that are supported, and those that are refused before anything is loaded or any process started."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from erpd_lightning.errors import InvalidArgument, UserError
from erpd_lightning.modules.evaluation import EvaluationModule
from erpd_lightning.modules.extreme_region import ExtremeRegionModule
from erpd_lightning.modules.policy_module import PolicyModule
from erpd_lightning.modules.strategies import check_strategy
from erpd_lightning.processes import started_rank
from support.modules import make_data, make_trainer


class Other(DDPStrategy):
    """A strategy of the user's own."""


def quiet(**settings: Any) -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **settings)


@pytest.mark.parametrize(
    ("strategy", "named"),
    [
        (ModelParallelStrategy(), "ModelParallelStrategy"),
        ("ddp_spawn", "ddp_spawn"),
        ("ddp_fork", "ddp_fork"),
        ("ddp_notebook", "ddp_fork"),
        (Other(), "Other"),
    ],
)
def test_strategies_that_are_refused(strategy: Any, named: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"^strategy is .*{named}.*: use ddp, or auto on one device$"):
        check_strategy(quiet(devices=2, strategy=strategy).strategy)


@pytest.mark.parametrize("settings", [{"devices": 1}, {"devices": 2, "strategy": "ddp"}])
def test_strategies_that_are_supported(settings: dict[str, Any]) -> None:
    check_strategy(quiet(**settings).strategy)


class Own(SingleDeviceStrategy):
    """Does what its parent does, which is not known of it."""


@pytest.mark.parametrize("run", ["fit", "validate", "test", "predict"])
def test_they_are_refused_before_anything_is_loaded(run: str, scored: Path, policies: dict[str, str]) -> None:
    module = ExtremeRegionModule("nowhere") if run == "fit" else EvaluationModule("nowhere")
    trainer = make_trainer(strategy=Own("cpu"))
    with pytest.raises(InvalidArgument, match="strategy is Own"):
        getattr(trainer, run)(module, datamodule=make_data(scored, policies))


def test_a_process_that_takes_itself_for_rank_zero(
    monkeypatch: pytest.MonkeyPatch, scored: Path, policies: dict[str, str]
) -> None:
    """As the second process does where the first trainer has two devices and the next one has one."""
    trainer = make_trainer()
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="started as rank 1, but the trainer has 1 process"):
        trainer.predict(PolicyModule("nowhere"), datamodule=make_data(scored, policies))


def test_a_trainer_of_another_size(monkeypatch: pytest.MonkeyPatch, scored: Path, policies: dict[str, str]) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    module, trainer = PolicyModule("nowhere"), make_trainer()
    module.trainer = trainer
    with pytest.raises(UserError, match="2 processes run together, but the trainer has 1"):
        module.setup("predict")


def test_rank_that_a_process_was_started_as() -> None:
    assert started_rank({}) == 0
    assert started_rank({"RANK": "5", "LOCAL_RANK": "1"}) == 5
    assert started_rank({"SLURM_PROCID": "3", "LOCAL_RANK": "0"}) == 3
    assert started_rank({"SLURM_PROCID": "0", "RANK": "1", "LOCAL_RANK": "1"}) == 1  # torchrun inside of SLURM


class NoGradients(ExtremeRegionModule):
    """Its gradients are kept elsewhere, as DeepSpeed keeps them."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter in self.policy.parameters():
            parameter.grad = None
        super().on_before_optimizer_step(optimizer)


def test_a_step_without_any_gradient(scored: Path, policies: dict[str, str]) -> None:
    with pytest.raises(RuntimeError, match="optimiser step 1: no parameter of the policy has a gradient"):
        make_trainer(max_epochs=1).fit(NoGradients(policies["base"]), datamodule=make_data(scored, policies))
