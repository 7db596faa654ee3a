"""Distillation to a tilted target against plain loops with all logits: the loss, the budget, and its calibration."""

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from erpd_lightning.budget.controller import MAX_CORRECTION
from erpd_lightning.budget.search import MAX_EXTRAPOLATION
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.store import Store
from erpd_lightning.errors import UserError
from erpd_lightning.models.policy import load_policy
from erpd_lightning.modules.distill import DistillModule
from erpd_lightning.objectives.signal import Signal, Term
from support.modules import (
    CLIP,
    NAMES,
    assert_same_gradients,
    first_step,
    gradients_of,
    make_data,
    make_trainer,
    stored_logps,
)
from support.policies import VOCABULARY_SIZE, make_model, token_logps, write_rollouts
from support.trainers import score

BUDGET = 0.1


def own_target_logps(row: dict[str, Any], beta: float) -> Tensor:
    """log of pi*_beta over the whole vocabulary at each response token."""
    logps = {
        name: token_logps(make_model(seed=seed), row["prompt_ids"], row["response_ids"]).detach()
        for seed, name in enumerate(NAMES[:3])
    }
    signal = (logps["teacher"] - logps["unlearned"]).clamp(-CLIP, CLIP)
    return (logps["base"] + signal / beta).log_softmax(-1)


@pytest.mark.parametrize("max_tokens", [10_000, 40])
def test_loss_of_distillation(
    scored: Path, policies: dict[str, str], rows: list[dict[str, Any]], max_tokens: int
) -> None:
    sizes = Store.open(scored / "scores" / "base").table()["support_size"].to_pylist()
    assert min(size for row in sizes for size in row) >= VOCABULARY_SIZE - 1
    data = make_data(scored, policies, scores=scored / "scores", max_tokens=max_tokens)
    module = DistillModule(policies["student"], kl_budget=None, beta=0.8)
    gradients, loss = first_step(module, data)
    model = make_model(seed=3)
    total, tokens = torch.zeros(()), 0
    for row in rows:
        logp = token_logps(model, row["prompt_ids"], row["response_ids"])
        total = total + (logp.exp() * (logp - own_target_logps(row, 0.8))).sum()
        tokens += len(logp)
    assert loss == pytest.approx(total.item() / tokens, rel=1e-4)
    assert_same_gradients(gradients, gradients_of(model, total / tokens))


def own_spent(scores: Path, beta: float, terms: Sequence[tuple[str, str, float, float]]) -> float:
    """Mean KL of the tilted to the base policy over stored states, from the files alone."""
    kls = []
    for logps in stored_logps(scores):
        signal = sum(w * np.clip(logps[n] - logps[d], -c, c) for n, d, w, c in terms)
        weights = np.exp(logps["base"]) * np.exp(signal / beta)
        target = weights / weights.sum()
        kls.append(float((target * (np.log(target + 1e-300) - logps["base"])).sum()))
    return float(np.mean(kls))


@pytest.mark.parametrize("budget", [0.01, 0.2])
@pytest.mark.parametrize(
    "terms",
    [
        [("teacher", "unlearned", 1.0, CLIP)],
        [("teacher", "base", 0.5, 1.0), ("base", "unlearned", 2.0, 5.0)],
    ],
)
def test_beta_spends_the_budget_on_the_stored_states(
    tmp_path: Path,
    rows: list[dict[str, Any]],
    policies: dict[str, str],
    budget: float,
    terms: list[tuple[str, str, float, float]],
) -> None:
    write_rollouts(tmp_path / "rollouts", rows)
    data = make_data(tmp_path, policies, scores=tmp_path / "scores")
    for name in NAMES[:3]:
        score(data, name, policies[name])
    signal = Signal([Term(*term) for term in terms])
    module = DistillModule(policies["base"], kl_budget=budget, signal=signal, warmup_steps=0)
    make_trainer(max_steps=1).fit(module, datamodule=data)
    assert module.beta is not None
    assert module.budget.solution is not None
    assert own_spent(tmp_path / "scores", module.beta, terms) == pytest.approx(budget, rel=2e-3)
    assert module.budget.solution.kl_base == pytest.approx(budget, rel=2e-3)


def test_a_budget_out_of_reach(tmp_path: Path, rows: list[dict[str, Any]], policies: dict[str, str]) -> None:
    write_rollouts(tmp_path / "rollouts", rows)
    data = make_data(tmp_path, policies, scores=tmp_path / "scores")
    for name in NAMES[:3]:
        score(data, name, policies["base"])
    with pytest.raises(UserError, match=r"^kl_budget cannot be spent: .*out of reach"):
        make_trainer(max_steps=1).fit(DistillModule(policies["base"]), datamodule=data)


# Calibration


class Betas(Callback):
    """Notes the beta of each epoch and what calibration measured at its end."""

    def __init__(self) -> None:
        self.by_epoch: dict[int, float] = {}
        self.spent: list[float] = []
        self.trained_weights: dict[str, torch.Tensor] = {}

    @property
    def betas(self) -> list[float]:
        return list(self.by_epoch.values())

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        assert self.by_epoch.setdefault(trainer.current_epoch, module.beta) == module.beta

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.trained_weights = copy.deepcopy(module.policy.state_dict())

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.spent.append(float(trainer.callback_metrics.get("calibration/kl_per_token", math.nan)))


def make_student(
    policies: dict[str, str], data: RolloutDataModule, calibrate: bool, **how: Any
) -> tuple[DistillModule, Betas]:
    module = DistillModule(
        policies["base"], kl_budget=BUDGET, calibrate=calibrate, learning_rate=0.01, warmup_steps=0, **how
    )
    seen = Betas()
    make_trainer(seen, max_epochs=5, gradient_clip_val=1.0).fit(module, datamodule=data)
    return module, seen


@pytest.mark.parametrize("calibrate", [False, True])
def test_no_kl_is_bought_below_the_least_beta(
    scored: Path,
    tmp_path: Path,
    evaluation_data: Callable[..., RolloutDataModule],
    policies: dict[str, str],
    calibrate: bool,
) -> None:
    """Where beta would be lower, what its least value spends is the budget; where it is higher, nothing changes."""
    terms = [("teacher", "unlearned", 1.0, CLIP)]
    settings: dict[str, Any] = {
        "scores": scored / "scores",
        "prompts": tmp_path / "prompts.jsonl",
        "prompts_per_round": 2,
        "calibration_prompts": 3,
    }
    free, _ = make_student(policies, evaluation_data(scored, **settings), calibrate=False)
    assert free.beta is not None
    assert free.budget.effective_budget == BUDGET
    loose, seen = make_student(
        policies, evaluation_data(scored, **settings), calibrate=calibrate, min_beta=free.beta / 2
    )
    assert loose.budget.effective_budget == BUDGET
    assert seen.betas[0] == free.beta
    tight, seen = make_student(
        policies, evaluation_data(scored, **settings), calibrate=calibrate, min_beta=free.beta * 2
    )
    assert tight.budget.effective_budget == pytest.approx(own_spent(scored / "scores", free.beta * 2, terms), rel=1e-4)
    assert tight.budget.effective_budget is not None
    assert tight.budget.effective_budget < 0.7 * BUDGET
    assert seen.betas[0] == pytest.approx(free.beta * 2, rel=1e-3)
    assert tight.kl_budget == BUDGET
    if calibrate:
        assert tight.budget.fit is not None
        assert tight.budget.fit.kl == tight.budget.effective_budget
        assert tight.budget.fit.alpha < MAX_EXTRAPOLATION


def test_calibration_spends_the_budget_on_fresh_samples(
    scored: Path,
    tmp_path: Path,
    evaluation_data: Callable[..., RolloutDataModule],
    policies: dict[str, str],
) -> None:
    settings: dict[str, Any] = {
        "scores": scored / "scores",
        "prompts": tmp_path / "prompts.jsonl",
        "prompts_per_round": 2,
        "calibration_prompts": 3,
        "calibration_samples": 8,
        "seed": 1,  # Gains within and beyond the largest correction are seen.
    }
    _, fixed = make_student(policies, evaluation_data(scored, **settings), calibrate=False)
    assert len(set(fixed.betas)) == 1
    assert all(math.isnan(spent) for spent in fixed.spent)
    module, seen = make_student(policies, evaluation_data(scored, **settings), calibrate=True)
    assert seen.betas[0] == fixed.betas[0]
    terms = [("teacher", "unlearned", 1.0, CLIP)]
    # The KL of the target in each epoch, and the gain that was seen at its end.
    targets = [own_spent(scored / "scores", beta, terms) for beta in seen.betas]
    gains = [spent / target for spent, target in zip(seen.spent, targets, strict=True)]
    used = [gains[:1], gains[:2], gains[1:3], gains[2:4]]
    for target, recent in zip(targets[1:], used, strict=True):
        gain = float(np.exp(np.mean(np.log(recent))))
        expected = BUDGET / min(max(gain, 1 / MAX_CORRECTION), MAX_CORRECTION)
        assert target == pytest.approx(expected, rel=5e-3)
    assert any(1.02 < max(gain, 1 / gain) < MAX_CORRECTION for gain in gains[1:3])
    assert any(max(gain, 1 / gain) > MAX_CORRECTION for gain in gains[:4])
    # What is reported is what the last epoch was trained with.
    assert module.beta == seen.betas[-1]
    assert module.budget.solution is not None
    assert module.budget.solution.kl_base == pytest.approx(targets[-1], rel=2e-3)
    # The weights that are exported are those between base and trained student at which the budget is spent.
    assert module.budget.fit is not None
    assert 0 < module.budget.fit.alpha <= MAX_EXTRAPOLATION
    base = load_policy(policies["base"]).state_dict()
    for name, weight in module.policy.state_dict().items():
        expected = base[name] + module.budget.fit.alpha * (seen.trained_weights[name] - base[name])
        torch.testing.assert_close(weight, expected)
    many = evaluation_data(scored, **{**settings, "calibration_samples": 64, "seed": 2})
    reference = DistillModule(tmp_path / "student", kl_budget=BUDGET, references={"base": str(policies["base"])})
    module.export(tmp_path / "student")
    held_out = tmp_path / "unused.jsonl"
    held_out.write_text("".join(json.dumps(vars(prompt)) + "\n" for prompt in many.prompt_plan.calibration))
    many = evaluation_data(scored, validation_prompts=held_out, validation_samples=64, seed=2)
    (measured,) = make_trainer().validate(reference, datamodule=many, verbose=False)
    assert module.budget.fit.kl == BUDGET or module.budget.fit.alpha == MAX_EXTRAPOLATION
    assert measured["val/kl_per_token"] == pytest.approx(module.budget.fit.kl, rel=0.25)


def test_a_student_of_another_start_is_not_calibrated(policies: dict[str, str]) -> None:
    assert DistillModule(policies["base"]).calibrates
    assert not DistillModule(policies["student"], references={"base": str(policies["base"])}).calibrates
