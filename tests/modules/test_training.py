"""Training of a module: optimizer and schedule, what is logged, what is not finite, and the export."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from erpd_lightning.errors import UserError
from erpd_lightning.models.policy import policy_fingerprint
from erpd_lightning.modules.extreme_region import ExtremeRegionModule
from erpd_lightning.modules.training import TrainingDiverged
from erpd_lightning.objectives.extreme import SAPO
from support.modules import first_step, make_data, make_trainer, sampled_logps
from support.policies import make_model, make_rows, token_logps, write_rollouts


class LearningRates(Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("name", ["cosine", "constant_with_warmup", "linear"])
def test_the_learning_rate_follows_its_schedule(scored: Path, policies: dict[str, str], name: str) -> None:
    seen = LearningRates()
    trainer = make_trainer(seen, max_epochs=4)
    module = ExtremeRegionModule(policies["base"], learning_rate=0.01, warmup_steps=3, lr_scheduler=name)
    trainer.fit(module, datamodule=make_data(scored, policies, batch_size=8, max_tokens=60))
    assert trainer.accumulate_grad_batches > 1
    after = {
        "cosine": [0.5 * (1 + math.cos(math.pi * step / 5)) for step in range(5)],
        "constant_with_warmup": [1.0] * 5,
        "linear": [1 - step / 5 for step in range(5)],
    }[name]
    assert seen.rates == pytest.approx([0.01 * factor for factor in [1 / 4, 2 / 4, 3 / 4, *after]])


def test_the_optimizer_is_what_was_asked_for(scored: Path, policies: dict[str, str]) -> None:
    module = ExtremeRegionModule(
        policies["base"], kl_coef=0.1, learning_rate=0.02, weight_decay=0.1, betas=(0.8, 0.9), warmup_steps=0
    )
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, datamodule=make_data(scored, policies))
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert (group["initial_lr"], group["weight_decay"], group["betas"]) == (0.02, 0.1, (0.8, 0.9))
    assert {id(p) for p in group["params"]} == {id(p) for p in module.policy.parameters()}


def test_a_fit_is_the_same_again(scored: Path, policies: dict[str, str]) -> None:
    def weights() -> Tensor:
        module = ExtremeRegionModule(policies["base"], kl_coef=0.1)
        data = make_data(scored, policies, batch_size=8, max_tokens=60)
        make_trainer(max_epochs=3).fit(module, datamodule=data)
        return torch.nn.utils.parameters_to_vector(module.policy.parameters())

    first = weights()
    torch.rand(7)
    assert torch.equal(weights(), first)
    start = torch.nn.utils.parameters_to_vector(make_model(seed=0).parameters())
    assert not torch.equal(first, start)


def test_logged_means_are_those_of_the_stored_tokens(
    scored: Path, policies: dict[str, str], rows: list[dict[str, Any]]
) -> None:
    module = ExtremeRegionModule(policies["student"], learning_rate=1e-12, kl_coef=0.2)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, datamodule=make_data(scored, policies, max_tokens=60))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    model = make_model(seed=3)
    logps = [sampled_logps(model, row).detach() for row in rows]
    by_reward = {
        reward: torch.cat([one for one, row in zip(logps, rows, strict=True) if row["reward"] == reward])
        for reward in (0, 1)
    }
    assert logged["train/logp_correct"] == pytest.approx(float(by_reward[1].mean()), rel=1e-5)
    assert logged["train/logp_incorrect"] == pytest.approx(float(by_reward[0].mean()), rel=1e-5)
    assert logged["train/logp"] == pytest.approx(float(torch.cat(logps).mean()), rel=1e-5)
    sampler_logps = torch.cat([torch.tensor(row["logps"]) for row in rows])
    assert logged["train/log_ratio"] == pytest.approx(float((torch.cat(logps) - sampler_logps).mean()), rel=1e-4)
    full = torch.cat([token_logps(model, r["prompt_ids"], r["response_ids"]).detach() for r in rows])
    assert logged["train/entropy"] == pytest.approx(float(-(full.exp() * full).sum(-1).mean()), rel=1e-5)
    # The base policy is the starting policy.
    assert abs(logged["train/kl"]) < 1e-6
    gradients, loss = first_step(ExtremeRegionModule(policies["student"]), make_data(scored, policies))
    assert logged["train/loss"] == pytest.approx(loss, rel=1e-5)
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    assert logged["train/grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_logged_log_probs_are_of_the_whole_epoch(
    scored: Path, policies: dict[str, str], rows: list[dict[str, Any]]
) -> None:
    """Over the steps of one epoch, each response counted as it comes by."""
    module = ExtremeRegionModule(policies["student"], learning_rate=1e-12)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=make_data(scored, policies, batch_size=5, max_tokens=60))
    model = make_model(seed=3)
    correct = torch.cat([sampled_logps(model, row).detach() for row in rows if row["reward"] == 1])
    assert float(trainer.callback_metrics["train/logp_correct"]) == pytest.approx(float(correct.mean()), rel=1e-5)


def test_a_schedule_that_needs_more_settings(policies: dict[str, str]) -> None:
    with pytest.raises(UserError, match="lr_scheduler is 'cosine_with_min_lr'"):
        ExtremeRegionModule(policies["base"], lr_scheduler="cosine_with_min_lr")


def test_export_of_what_was_trained(scored: Path, policies: dict[str, str], tmp_path: Path) -> None:
    module = ExtremeRegionModule(policies["base"], warmup_steps=0)
    make_trainer(max_steps=1).fit(module, datamodule=make_data(scored, policies))
    module.export(tmp_path / "one")
    module.export(tmp_path / "two", tokenizer=policies["student"])
    assert policy_fingerprint(tmp_path / "one") == policy_fingerprint(tmp_path / "two")
    assert policy_fingerprint(tmp_path / "one") != module.fingerprint == policy_fingerprint(policies["base"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in module.policy.model.state_dict().items())


# What is not finite


class Poison(SAPO):
    """Turns the terms of one optimiser step bad."""

    def __init__(self, step: int, value: float) -> None:
        super().__init__()
        self.left, self.value = step, value

    def __call__(self, logps: Tensor, *others: Tensor) -> Tensor:
        self.left -= 1
        terms = super().__call__(logps, *others)
        return terms if self.left else terms + self.value * logps


class Weights(Callback):
    """Notes the weights after each step, and the rows of the step to come."""

    def __init__(self) -> None:
        self.weights: Tensor | None = None
        self.rows: list[int] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.rows = batch.rows.tolist()

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.weights = torch.nn.utils.parameters_to_vector(module.policy.parameters()).detach().clone()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_training_stops_before_a_step_that_is_not_finite(
    scored: Path, policies: dict[str, str], tmp_path: Path, value: float
) -> None:
    module = ExtremeRegionModule(policies["base"], objective=Poison(3, value))
    seen = Weights()
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1)
    trainer = make_trainer(seen, saver, max_epochs=9)
    with pytest.raises(TrainingDiverged, match="optimiser step 3:") as error:
        trainer.fit(module, datamodule=make_data(scored, policies, batch_size=6))
    rows = str(error.value).split("rows of the store: ")[1].split(". The last")[0]
    assert [int(row) for row in rows.split(", ")] == seen.rows
    assert 0 < len(seen.rows) <= 6
    assert len(str(error.value).splitlines()) == 1
    assert isinstance(error.value, UserError)
    weights = torch.nn.utils.parameters_to_vector(module.policy.parameters())
    assert seen.weights is not None
    assert torch.equal(weights, seen.weights)
    assert weights.isfinite().all()
    checkpoint = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    kept = checkpoint["state_dict"]["policy.model.model.norm.weight"]
    assert torch.equal(kept, module.policy.model.model.norm.weight)


def test_many_rows_are_named_in_short(scored: Path, policies: dict[str, str], tmp_path: Path) -> None:
    write_rollouts(tmp_path / "rollouts", make_rows(groups=8, group_size=4))
    module = ExtremeRegionModule(policies["base"], objective=Poison(1, math.nan))
    with pytest.raises(TrainingDiverged, match=r"… \(32 in all\)"):
        make_trainer(max_epochs=1).fit(module, datamodule=make_data(tmp_path, policies))
