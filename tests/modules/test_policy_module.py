"""Reference policies of a module, and settings of all modules that are refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.errors import UserError
from erpd_lightning.modules.distill import DistillModule
from erpd_lightning.modules.evaluation import EvaluationModule
from erpd_lightning.modules.extreme_region import ExtremeRegionModule
from erpd_lightning.modules.policy_module import PolicyModule
from erpd_lightning.modules.training import TrainingModule
from support.modules import Validations, make_trainer
from support.policies import make_model


@pytest.mark.parametrize(("kl_coef", "estimator"), [(0.0, "exact"), (0.1, "exact"), (0.1, "k2")])
def test_reference_policies_are_let_go(
    scored: Path,
    evaluation_data: Callable[..., RolloutDataModule],
    policies: dict[str, str],
    kl_coef: float,
    estimator: Any,
) -> None:
    references = {"base": str(policies["base"]), "first": str(policies["teacher"])}
    seen = Validations()
    module = ExtremeRegionModule(policies["student"], references=references, kl_coef=kl_coef, kl_estimator=estimator)
    trainer = make_trainer(seen, max_epochs=2)
    trainer.fit(module, datamodule=evaluation_data(scored))
    assert set(seen.during) == {2}
    # Only what the loss needs stays in memory while training goes on.
    assert {number > 0 for number in seen.training} == {kl_coef > 0 and estimator == "exact"}
    assert module._references == {}
    assert seen.alive == 0
    assert all(key.startswith("policy.model.") for key in module.state_dict())
    assert len(list(module.parameters())) == len(list(make_model().parameters()))
    before = len(seen.during)
    trainer.test(module, datamodule=evaluation_data(scored), verbose=False)
    assert len(seen.during) > before
    assert module._references == {}
    assert seen.alive == 0


def test_reference_policies_do_not_move(
    scored: Path, evaluation_data: Callable[..., RolloutDataModule], policies: dict[str, str]
) -> None:
    module = ExtremeRegionModule(policies["base"], kl_coef=1.0, learning_rate=0.01, warmup_steps=0)
    seen = Validations()
    trainer = make_trainer(seen, max_epochs=2)
    trainer.fit(module, datamodule=evaluation_data(scored, batch_size=8))
    reference = module.reference("base")
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    start = make_model(seed=0)
    for mine, theirs in zip(reference.model.parameters(), start.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert seen.found[-1]["val/kl_per_token"] > 0
    module.release_references()


# Settings


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: TrainingModule("p", learning_rate=0.0), "learning_rate"),
        (lambda: TrainingModule("p", learning_rate=math.nan), "learning_rate"),
        (lambda: TrainingModule("p", warmup_steps=-1), "warmup_steps"),
        (lambda: PolicyModule("p", dtype="float31"), "dtype"),
        (lambda: PolicyModule("p", dtype="int64"), "dtype"),
        (lambda: PolicyModule("p", dtype="nn"), "dtype"),
        (lambda: TrainingModule("p", lr_scheduler="jagged"), "lr_scheduler"),
        (lambda: TrainingModule("p", weight_decay=-0.1), "weight_decay"),
        (lambda: TrainingModule("p", betas=(0.9, 1.0)), "betas"),
        (lambda: PolicyModule("p", max_logits=0), "max_logits"),
        (lambda: EvaluationModule("p", pass_at_k=0), "pass_at_k"),
        (lambda: ExtremeRegionModule("p", sign=0), "sign"),
        (lambda: ExtremeRegionModule("p", kl_coef=-0.1), "kl_coef"),
        (lambda: ExtremeRegionModule("p", kl_coef=math.inf), "kl_coef"),
        (lambda: ExtremeRegionModule("p", kl_coef=0.1, references={"first": "q"}), "kl_coef"),
        (lambda: DistillModule("p", kl_budget=0.0), "kl_budget"),
        (lambda: DistillModule("p", kl_budget=-1.0), "kl_budget"),
        (lambda: DistillModule("p", kl_budget=math.nan), "kl_budget"),
        (lambda: DistillModule("p", kl_budget=math.inf), "kl_budget"),
        (lambda: DistillModule("p", kl_budget=None, beta=0.0), "beta"),
        (lambda: DistillModule("p", min_beta=0.0), "^min_beta is 0.0"),
        (lambda: DistillModule("p", min_beta=1.0, kl_budget=None, beta=1.0), "min_beta goes with kl_budget"),
        (lambda: DistillModule("p", min_beta=1.0, total_budget=0.1), "min_beta goes with kl_budget alone"),
        (lambda: DistillModule("p", min_beta=1.0, signal="auto"), "min_beta is a price for one signal"),
        (lambda: DistillModule("p", kl_budget=None), "beta"),
        (lambda: DistillModule("p", kl_budget=0.1, beta=1.0), "kl_budget"),
    ],
)
def test_settings_out_of_range(make: Callable[[], PolicyModule], key: str) -> None:
    with pytest.raises(UserError, match=key):
        make()
