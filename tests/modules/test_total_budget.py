"""A budget over all rounds beside the round's own: prices, loss and search, from the stored scores alone."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from erpd_lightning.budget.interpolation import WeightInterpolation
from erpd_lightning.data.predict_data import BatchList
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.errors import UserError
from erpd_lightning.metrics import ClusteredRatio
from erpd_lightning.modules.distill import DistillModule
from support.modules import stored_logps
from support.policies import make_model, make_rows, save_policy, write_rollouts
from support.trainers import make_trainer, score

BUDGET = 0.05


def mixed(alpha: float) -> Any:
    """A policy that is this far from that of seed 0 on the way to that of seed 3."""
    model = make_model(3)
    WeightInterpolation(make_model(0).parameters(), model.parameters()).move_to(alpha)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policies, rollouts, and what each policy says of them."""
    folder = tmp_path_factory.mktemp("scored")
    models = {"base": make_model(0), "teacher": make_model(1), "unlearned": make_model(2), "first": mixed(0.05)}
    write_rollouts(folder / "rollouts", make_rows(groups=4, group_size=4))
    for name, model in models.items():
        save_policy(folder / name, model)
        score(make_data(folder), name, folder / name)
    return folder


def make_data(folder: Path, **settings: Any) -> RolloutDataModule:
    defaults: dict[str, Any] = {"tokenizer": folder / "base", "scores": folder / "scores", "batch_size": 100}
    return RolloutDataModule(folder / "rollouts", **{**defaults, **settings})


def make_student(folder: Path, total_budget: float | None, **settings: Any) -> DistillModule:
    references = {name: str(folder / name) for name in ("base", "first")}
    defaults: dict[str, Any] = {"kl_budget": BUDGET, "learning_rate": 1e-8, "warmup_steps": 0}
    return DistillModule(
        folder / "base",
        total_budget=total_budget,
        references=references,
        **{**defaults, **settings},
    )


class Losses(Callback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.found.append(float(trainer.callback_metrics["train/loss"]))


def fit(module: DistillModule, data: RolloutDataModule, **settings: Any) -> list[float]:
    losses = Losses()
    make_trainer(losses, **{"max_steps": 1, "limit_val_batches": 0, **settings}).fit(module, datamodule=data)
    return losses.found


def own(folder: Path, beta_base: float, beta_first: float) -> tuple[float, float, float]:
    """Mean KL of the target to base, to first, and of base to the target, over the stored states' support."""
    found = []
    for logps in stored_logps(folder / "scores"):
        signal = np.clip(logps["teacher"] - logps["unlearned"], -3, 3)
        log_target = (beta_base * logps["base"] + beta_first * logps["first"] + signal) / (beta_base + beta_first)
        log_target -= np.log(np.exp(log_target).sum())
        target, base = np.exp(log_target), np.exp(logps["base"])
        kls = [float((target * (log_target - logps[name])).sum()) for name in ("base", "first")]
        found.append((*kls, float((base * (logps["base"] - log_target)).sum())))
    to_base, to_first, from_base = np.mean(found, axis=0)
    return float(to_base), float(to_first), float(from_base)


def test_both_budgets_bind(folder: Path) -> None:
    loose = make_student(folder, total_budget=None)
    fit(loose, make_data(folder))
    assert loose.beta is not None
    _, unbound, _ = own(folder, loose.beta, 0.0)
    total = 0.8 * unbound
    module = make_student(folder, total)
    (loss,) = fit(module, make_data(folder))
    assert module.budget.solution is not None
    prices = (module.budget.solution.beta_base, module.budget.solution.beta_first)
    assert min(prices) > 0
    assert module.beta == pytest.approx(sum(prices))
    to_base, to_first, from_base = own(folder, *prices)
    assert to_base == pytest.approx(BUDGET, rel=2e-3)
    assert to_first == pytest.approx(total, rel=2e-3)
    # The student is still the base policy: the loss is the KL of it to the target between the two references.
    assert loss == pytest.approx(from_base, rel=1e-3)


def test_a_total_budget_that_is_not_spent_changes_nothing(folder: Path) -> None:
    one, two = make_student(folder, None), make_student(folder, 10.0)
    assert fit(one, make_data(folder)) == fit(two, make_data(folder))
    assert one.beta == pytest.approx(two.beta)
    assert two.budget.solution is not None
    assert two.budget.solution.beta_first == 0


def test_the_search_keeps_to_the_tighter_budget(folder: Path) -> None:
    """Twice the total budget is spent where the round's is just spent: the search is told of twice the round's."""
    module, spent = make_student(folder, 0.2), {"base": BUDGET, "first": 0.4}
    data = make_data(folder)
    data.calibration_batches = lambda purpose: BatchList([None])  # type: ignore[method-assign]
    module._trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]

    def evaluate(batch: Any, metrics: Any) -> None:
        for name, kl in spent.items():
            metrics[f"kl_per_token/{name}"] = ClusteredRatio()
            metrics[f"kl_per_token/{name}"].update(torch.tensor([kl]), torch.tensor([1.0]))

    module.evaluate = evaluate  # type: ignore[assignment, method-assign]
    assert module._measure_spent("landing 0").kl == pytest.approx(2 * BUDGET)
    spent["first"] = 0.1
    assert module._measure_spent("landing 1").kl == pytest.approx(BUDGET)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_budget": 0.0}, r"^total_budget is 0.0: it must be a positive, finite number"),
        ({"total_budget": math.inf}, r"^total_budget is inf"),
        ({"total_budget": 0.1, "kl_budget": None, "beta": 1.0}, "^total_budget goes with kl_budget"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DistillModule("p", **settings)


def test_a_total_budget_that_excludes_the_round_s(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^kl_budget cannot be spent: .*out of reach"):
        fit(make_student(folder, 1e-6, kl_budget=1e-6), make_data(folder))


def test_scores_of_the_first_policy_are_needed(folder: Path, tmp_path: Path) -> None:
    for name in ("base", "teacher", "unlearned"):
        (tmp_path / "scores").mkdir(exist_ok=True)
        (tmp_path / "scores" / name).symlink_to(folder / "scores" / name)
    with pytest.raises(UserError, match="distillation uses the policies first, which were not scored"):
        fit(make_student(folder, 0.1), make_data(folder, scores=tmp_path / "scores"))
