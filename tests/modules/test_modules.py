"""Both modules against plain loops over unpadded sequences with all logits: losses, gradients, metrics, logs."""

import copy
import gc
import json
import math
import weakref
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from erpd_lightning.budget.controller import MAX_CORRECTION
from erpd_lightning.budget.search import MAX_EXTRAPOLATION
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samplers import Response, TransformersSampler
from erpd_lightning.data.store import Store
from erpd_lightning.data.verifiers import Verifier
from erpd_lightning.errors import UserError
from erpd_lightning.models.policy import load_policy, policy_fingerprint
from erpd_lightning.modules import scoring
from erpd_lightning.modules.distill import DistillModule
from erpd_lightning.modules.evaluation import EvaluationModule
from erpd_lightning.modules.extreme_region import ExtremeRegionModule
from erpd_lightning.modules.policy_module import PolicyModule
from erpd_lightning.modules.training import TrainingDiverged, TrainingModule
from erpd_lightning.objectives.clipped import GSPO
from erpd_lightning.objectives.extreme import SAPO, CrossEntropy, ExtremeObjective
from erpd_lightning.objectives.regression import SquaredError
from erpd_lightning.objectives.signal import Signal, Term
from erpd_lightning.seeds import derive_seed
from support import reference, trainers
from support.policies import VOCABULARY_SIZE, make_model, make_rows, save_policy, token_logps, write_rollouts
from support.trainers import fake_trainer, run_prediction

NAMES = ("base", "teacher", "unlearned", "student")
CLIP = 3.0


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Policies of four seeds by name."""
    folder = tmp_path_factory.mktemp("policies")
    return {name: save_policy(folder / name, seed=seed) for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return make_rows(groups=4, group_size=4)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], policies: dict[str, Path]) -> Path:
    """A store and scores of three policies on it, over almost all of the vocabulary."""
    folder = tmp_path_factory.mktemp("scored")
    write_rollouts(folder / "rollouts", rows)
    data = make_data(folder, policies, scores=folder / "scores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "SUPPORT_MASS", 1.0)
        for name in NAMES[:3]:
            module = PolicyModule(policies[name], references={})
            module.configure_model()
            run_prediction(data.scoring(name), module)
    return folder


def make_data(folder: Path, policies: dict[str, Path], **settings: Any) -> RolloutDataModule:
    defaults: dict[str, Any] = {"batch_size": 100, "tokenizer": policies["base"]}
    return RolloutDataModule(folder / "rollouts", **{**defaults, **settings})


class FirstStep(Callback):
    """Notes the gradient of the first optimiser step, before it is clipped."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if not self.gradients:
            self.gradients = {
                name: parameter.grad.clone() for name, parameter in module.policy.model.named_parameters()
            }


def make_trainer(**settings: Any) -> Trainer:
    return trainers.make_trainer(**{"log_every_n_steps": 1, "gradient_clip_val": 0.01, **settings})


def first_step(module: PolicyModule, data: RolloutDataModule, **settings: Any) -> tuple[dict[str, Tensor], float]:
    """Gradient and loss of the first step."""
    seen = FirstStep()
    trainer = make_trainer(max_steps=1, callbacks=[seen], **settings)
    trainer.fit(module, datamodule=data)
    return seen.gradients, float(trainer.callback_metrics["train/loss"])


def gradients_of(model: Any, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], factor: float = 1.0) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], factor * gradient, atol=2e-5 * largest, rtol=1e-3)


def sampled_logps(model: Any, row: dict[str, Any]) -> Tensor:
    logps = token_logps(model, row["prompt_ids"], row["response_ids"])
    return logps.gather(1, torch.tensor(row["response_ids"])[:, None])[:, 0]


def own_advantages(rows: list[dict[str, Any]]) -> list[float]:
    groups, rewards = [row["group"] for row in rows], [row["reward"] for row in rows]
    return [float(value) for value in reference.group_advantages(rewards, groups)]


def own_sapo(model: Any, rows: list[dict[str, Any]], advantages: list[float]) -> Tensor:
    """The sum of SAPO's terms over all response tokens, divided by their number."""
    total, tokens = torch.zeros(()), 0
    for row, advantage in zip(rows, advantages, strict=True):
        tau = 1.0 if advantage > 0 else 1.05
        ratio = torch.exp(sampled_logps(model, row) - torch.tensor(row["logps"]))
        total = total - (4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage).sum()
        tokens += len(row["response_ids"])
    return total / tokens


def own_kl(model: Any, base: Any, rows: list[dict[str, Any]], direction: str = "reverse") -> Tensor:
    """KL(model || base), or KL(base || model), over the whole vocabulary, the mean of all response tokens."""
    total, tokens = torch.zeros(()), 0
    for row in rows:
        logp = token_logps(model, row["prompt_ids"], row["response_ids"])
        logq = token_logps(base, row["prompt_ids"], row["response_ids"]).detach()
        first, second = (logp, logq) if direction == "reverse" else (logq, logp)
        total = total + (first.exp() * (first - second)).sum()
        tokens += len(logp)
    return total / tokens


# Extreme region


@pytest.mark.parametrize("max_tokens", [10_000, 40])
@pytest.mark.parametrize("sign", [1, -1])
def test_gradient_of_the_extreme_region(
    scored: Path, policies: dict[str, Path], rows: list[dict[str, Any]], max_tokens: int, sign: int
) -> None:
    module = ExtremeRegionModule(policies["student"], sign=sign)
    gradients, loss = first_step(module, make_data(scored, policies, max_tokens=max_tokens))
    model = make_model(seed=3)
    advantages = [sign * advantage for advantage in own_advantages(rows)]
    expected = own_sapo(model, rows, advantages)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients, gradients_of(model, expected))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_kl_term_adds_its_gradient(
    scored: Path, policies: dict[str, Path], rows: list[dict[str, Any]], direction: Any
) -> None:
    references = {"base": str(policies["base"])}
    settings: dict[str, Any] = {"references": references, "kl_direction": direction}
    results = [
        first_step(
            ExtremeRegionModule(policies["student"], kl_coef=coefficient, **settings),
            make_data(scored, policies, max_tokens=60),
        )
        for coefficient in (0.0, 0.3)
    ]
    (plain, loss), (constrained, constrained_loss) = results
    model, base = make_model(seed=3), make_model(seed=0)
    kl = own_kl(model, base, rows, direction)
    assert kl > 0.1
    assert constrained_loss - loss == pytest.approx(0.3 * kl.item(), rel=1e-4)
    added = {name: constrained[name] - plain[name] for name in plain}
    assert_same_gradients(added, gradients_of(model, kl), factor=0.3)


@pytest.mark.parametrize("objective", [SAPO(), SquaredError()], ids=["token", "response"])
@pytest.mark.parametrize(("direction", "estimator"), [("reverse", "k2"), ("forward", "k1"), ("forward", "k3")])
def test_a_sampled_kl_term_needs_the_stored_log_probs_alone(
    scored: Path,
    policies: dict[str, Path],
    rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    direction: Any,
    estimator: Any,
    objective: Any,
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a second policy was loaded")

    monkeypatch.setattr(PolicyModule, "reference", refuse)
    settings: dict[str, Any] = {"objective": objective, "references": {}}
    data = make_data(scored, policies, max_tokens=60)
    plain, loss = first_step(ExtremeRegionModule(policies["student"], **settings), data)
    module = ExtremeRegionModule(
        policies["student"], kl_coef=0.3, kl_direction=direction, kl_estimator=estimator, **settings
    )
    seen = FirstStep()
    trainer = make_trainer(max_steps=1, callbacks=[seen])
    trainer.fit(module, datamodule=data)

    model, terms, values = make_model(seed=3), [], []
    for row in rows:
        logps, stored = sampled_logps(model, row), torch.tensor(row["logps"])
        weight = torch.exp(logps - stored)  # pi / base
        if direction == "reverse":
            terms.append(weight.detach() * (logps - stored) ** 2 / 2)
            values.append(1 - weight + weight * (logps - stored))
        else:
            values.append(weight - 1 - (logps - stored))
            terms.append(stored - logps if estimator == "k1" else values[-1])
    expected = torch.cat(terms).mean()
    assert expected.abs() > 0.01
    logged = trainer.callback_metrics
    assert float(logged["train/loss"]) - loss == pytest.approx(0.3 * expected.item(), rel=1e-3)
    assert float(logged["train/kl"]) == pytest.approx(torch.cat(values).mean().item(), rel=1e-3)
    added = {name: seen.gradients[name] - plain[name] for name in plain}
    assert_same_gradients(added, gradients_of(model, expected), factor=0.3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kl_estimator": "k1"}, "k1 is no loss for the reverse KL: its gradient is zero on average"),
        ({"kl_estimator": "k3"}, "k3 is no loss for the reverse KL: its gradient is that of the forward KL"),
        ({"kl_estimator": "k2", "kl_direction": "forward"}, "k2 is no loss for the forward KL: its gradient is"),
    ],
)
def test_a_kl_term_of_the_wrong_gradient(policies: dict[str, Path], settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=rf"^kl_estimator is 'k[123]': {expected}") as error:
        ExtremeRegionModule(policies["base"], kl_coef=0.1, **settings)
    assert len(str(error.value).splitlines()) == 1


def test_cross_entropy_is_the_models_own_loss(
    scored: Path, policies: dict[str, Path], rows: list[dict[str, Any]]
) -> None:
    module = ExtremeRegionModule(policies["student"], objective=CrossEntropy())
    gradients, loss = first_step(module, make_data(scored, policies, max_tokens=50))
    model = make_model(seed=3)
    right = [row for row in rows if row["reward"] == 1]
    assert 0 < len(right) < len(rows)
    width = max(len(row["prompt_ids"]) + len(row["response_ids"]) for row in right)
    ids, labels, attention = (torch.zeros(len(right), width, dtype=torch.long) for _ in range(3))
    labels -= 100
    for number, row in enumerate(right):
        prompt, response = row["prompt_ids"], row["response_ids"]
        ids[number, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
        labels[number, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
        attention[number, : len(prompt) + len(response)] = 1
    expected = model(input_ids=ids, attention_mask=attention, labels=labels).loss
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients, gradients_of(model, expected))


def test_cross_entropy_with_the_sign_flipped_learns_wrong_responses(
    scored: Path, policies: dict[str, Path], rows: list[dict[str, Any]]
) -> None:
    module = ExtremeRegionModule(policies["student"], objective=CrossEntropy(), sign=-1)
    gradients, loss = first_step(module, make_data(scored, policies))
    model = make_model(seed=3)
    expected = -torch.cat([sampled_logps(model, row) for row in rows if row["reward"] == 0]).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients, gradients_of(model, expected))


def own_squared_error(model: Any, rows: list[dict[str, Any]], advantages: list[float], beta: float) -> Tensor:
    """The mean over responses, whatever their lengths."""
    total = torch.zeros(())
    for row, advantage in zip(rows, advantages, strict=True):
        log_ratio = (sampled_logps(model, row) - torch.tensor(row["logps"])).sum()
        total = total + (beta * log_ratio - advantage) ** 2
    return total / len(rows)


@pytest.mark.parametrize("max_tokens", [10_000, 40])
@pytest.mark.parametrize("kl_coef", [0.0, 30.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_terms_of_responses_are_divided_by_the_responses_of_the_step(
    scored: Path, policies: dict[str, Path], rows: list[dict[str, Any]], max_tokens: int, kl_coef: float, sign: int
) -> None:
    """And a KL term stays one of nats per token beside them."""
    module = ExtremeRegionModule(
        policies["student"],
        objective=SquaredError(beta=0.2),
        sign=sign,
        kl_coef=kl_coef,
        references={"base": str(policies["base"])},
    )
    gradients, loss = first_step(module, make_data(scored, policies, max_tokens=max_tokens))
    model = make_model(seed=3)
    advantages = [sign * advantage for advantage in own_advantages(rows)]
    expected = own_squared_error(model, rows, advantages, beta=0.2)
    expected = expected + kl_coef * own_kl(model, make_model(seed=0), rows)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients, gradients_of(model, expected))


@pytest.mark.parametrize("fillers", [0, 3])
def test_rows_that_fill_up_a_batch_have_no_share(
    scored: Path, policies: dict[str, Path], rows: list[dict[str, Any]], fillers: int
) -> None:
    data = make_data(scored, policies)
    module = ExtremeRegionModule(policies["student"], objective=GSPO())
    module.trainer = fake_trainer()
    data.trainer = fake_trainer()
    (batch,) = data.train_dataloader()
    assert batch.step_responses == len(rows)
    module.configure_model()
    expected = module.training_step(batch, 0)["loss"]
    batch.mask[:fillers] = False
    losses, _ = module.batch_loss(batch)
    assert (losses[:fillers] != 0).all()
    loss = module.training_step(batch, 0)["loss"]
    assert loss.item() == pytest.approx(float(losses[fillers:].sum()) / len(rows))
    assert fillers == 0 or loss != expected


class Misshapen(ExtremeObjective):
    """Says one thing and gives another."""

    def select(self, rewards: Tensor, advantages: Tensor) -> Tensor:
        return advantages != 0

    def __call__(self, logps: Tensor, *_: Tensor) -> Tensor:
        return -logps.sum(-1)


def test_terms_of_another_shape_than_announced(scored: Path, policies: dict[str, Path]) -> None:
    module = ExtremeRegionModule(policies["base"], objective=Misshapen())
    with pytest.raises(
        UserError, match=r"^objective is Misshapen, which gave a loss of shape \(\d+,\); with per = 'token' it must be"
    ):
        make_trainer(max_steps=1).fit(module, datamodule=make_data(scored, policies))


class LearningRates(Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("name", ["cosine", "constant_with_warmup", "linear"])
def test_the_learning_rate_follows_its_schedule(scored: Path, policies: dict[str, Path], name: str) -> None:
    seen = LearningRates()
    trainer = make_trainer(max_epochs=4, callbacks=[seen])
    module = ExtremeRegionModule(policies["base"], learning_rate=0.01, warmup_steps=3, lr_scheduler=name)
    trainer.fit(module, datamodule=make_data(scored, policies, batch_size=8, max_tokens=60))
    assert trainer.accumulate_grad_batches > 1
    after = {
        "cosine": [0.5 * (1 + math.cos(math.pi * step / 5)) for step in range(5)],
        "constant_with_warmup": [1.0] * 5,
        "linear": [1 - step / 5 for step in range(5)],
    }[name]
    assert seen.rates == pytest.approx([0.01 * factor for factor in [1 / 4, 2 / 4, 3 / 4, *after]])


def test_the_optimizer_is_what_was_asked_for(scored: Path, policies: dict[str, Path]) -> None:
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


def test_a_fit_is_the_same_again(scored: Path, policies: dict[str, Path]) -> None:
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
    scored: Path, policies: dict[str, Path], rows: list[dict[str, Any]]
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
    anchors = torch.cat([torch.tensor(row["logps"]) for row in rows])
    assert logged["train/log_ratio"] == pytest.approx(float((torch.cat(logps) - anchors).mean()), rel=1e-4)
    full = torch.cat([token_logps(model, r["prompt_ids"], r["response_ids"]).detach() for r in rows])
    assert logged["train/entropy"] == pytest.approx(float(-(full.exp() * full).sum(-1).mean()), rel=1e-5)
    # The base policy is the starting policy.
    assert abs(logged["train/kl"]) < 1e-6
    gradients, loss = first_step(ExtremeRegionModule(policies["student"]), make_data(scored, policies))
    assert logged["train/loss"] == pytest.approx(loss, rel=1e-5)
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    assert logged["train/grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_logged_log_probs_are_of_the_whole_epoch(
    scored: Path, policies: dict[str, Path], rows: list[dict[str, Any]]
) -> None:
    """Over the steps of one epoch, each response counted as it passes by."""
    module = ExtremeRegionModule(policies["student"], learning_rate=1e-12)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=make_data(scored, policies, batch_size=5, max_tokens=60))
    model = make_model(seed=3)
    right = torch.cat([sampled_logps(model, row).detach() for row in rows if row["reward"] == 1])
    assert float(trainer.callback_metrics["train/logp_correct"]) == pytest.approx(float(right.mean()), rel=1e-5)


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
    scored: Path, policies: dict[str, Path], tmp_path: Path, value: float
) -> None:
    module = ExtremeRegionModule(policies["base"], objective=Poison(3, value))
    seen = Weights()
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1)
    trainer = make_trainer(max_epochs=9, callbacks=[seen, saver], enable_checkpointing=True)
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


def test_many_rows_are_named_in_short(scored: Path, policies: dict[str, Path], tmp_path: Path) -> None:
    write_rollouts(tmp_path / "rollouts", make_rows(groups=8, group_size=4))
    module = ExtremeRegionModule(policies["base"], objective=Poison(1, math.nan))
    with pytest.raises(TrainingDiverged, match=r"… \(32 in all\)"):
        make_trainer(max_epochs=1).fit(module, datamodule=make_data(tmp_path, policies))


# Distillation


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
    scored: Path, policies: dict[str, Path], rows: list[dict[str, Any]], max_tokens: int
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
    tables = {name: Store.open(scores / name).table().to_pylist() for name in NAMES[:3]}
    kls = []
    for row in range(len(tables["base"])):
        entry = 0
        for t, size in enumerate(tables["base"][row]["support_size"]):
            logps = {
                name: np.array([*table[row]["support_logps"][entry : entry + size], table[row]["tail_logps"][t]])
                for name, table in tables.items()
            }
            entry += size
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
    policies: dict[str, Path],
    budget: float,
    terms: list[tuple[str, str, float, float]],
) -> None:
    write_rollouts(tmp_path / "rollouts", rows)
    data = make_data(tmp_path, policies, scores=tmp_path / "scores")
    for name in NAMES[:3]:
        scorer = PolicyModule(policies[name], references={})
        scorer.configure_model()
        run_prediction(data.scoring(name), scorer)
    signal = Signal([Term(*term) for term in terms])
    module = DistillModule(policies["base"], kl_budget=budget, signal=signal, warmup_steps=0)
    make_trainer(max_steps=1).fit(module, datamodule=data)
    assert module.beta is not None
    assert module.budget.solution is not None
    assert own_spent(tmp_path / "scores", module.beta, terms) == pytest.approx(budget, rel=2e-3)
    assert module.budget.solution.kl_base == pytest.approx(budget, rel=2e-3)


@pytest.mark.parametrize("calibrate", [False, True])
def test_no_kl_is_bought_below_the_least_beta(
    scored: Path,
    tmp_path: Path,
    evaluation_data: Callable[..., RolloutDataModule],
    policies: dict[str, Path],
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


def test_a_budget_out_of_reach(tmp_path: Path, rows: list[dict[str, Any]], policies: dict[str, Path]) -> None:
    write_rollouts(tmp_path / "rollouts", rows)
    data = make_data(tmp_path, policies, scores=tmp_path / "scores")
    for name in NAMES[:3]:
        scorer = PolicyModule(policies["base"], references={})
        scorer.configure_model()
        run_prediction(data.scoring(name), scorer)
    with pytest.raises(UserError, match=r"^kl_budget cannot be spent: .*out of reach"):
        make_trainer(max_steps=1).fit(DistillModule(policies["base"]), datamodule=data)


# Evaluation


class Even(Verifier):
    """Rewards responses whose last character is an even digit; what ends with a 9 cannot be checked."""

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        return [None if r.endswith("9") else float(r[-1:] in set("02468")) for r in responses]


class Recorder(TransformersSampler):
    """Remembers the responses, of which so many in a row are alike, whatever their prompts."""

    def __init__(self, alike: int = 1) -> None:
        super().__init__(6, batch_size=8)
        self.alike = alike
        self.drawn: list[tuple[list[int], Response]] = []
        self.seeds: list[int] = []

    def sample(self, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], seed: int) -> list[Response]:
        responses = super().sample(model, tokenizer, prompts, seed)
        responses = [responses[n - n % self.alike] for n in range(len(responses))]
        self.drawn += [(list(prompt), response) for prompt, response in zip(prompts, responses, strict=True)]
        self.seeds.append(seed)
        return responses


PROMPTS = ["1+2*3:", "4-5:", "6*7-8+9:", "0:", "1-1:"]
SAMPLES = 4


@pytest.fixture
def evaluation_data(tmp_path: Path, policies: dict[str, Path]) -> Callable[..., RolloutDataModule]:
    lines = [json.dumps({"prompt": prompt, "answer": "?"}) for prompt in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))

    def make(folder: Path = tmp_path, **settings: Any) -> RolloutDataModule:
        defaults: dict[str, Any] = {
            "validation_prompts": tmp_path / "prompts.jsonl",
            "validation_samples": SAMPLES,
            "sampler": Recorder(),
            "verifier": Even(),
            "max_tokens": 50,
        }
        return make_data(folder, policies, **{**defaults, **settings})

    return make


def ratio(x: Any, y: Any) -> tuple[float, float]:
    """A ratio of sums over prompts, and the standard error of its linearised residuals."""
    x, y = np.array(x, dtype=float), np.array(y, dtype=float)
    value = x.sum() / y.sum()
    residuals = x - value * y
    return float(value), float(np.std(residuals, ddof=1) * len(x) ** 0.5 / y.sum())


def measured(
    drawn: list[tuple[list[int], Response]], policies: dict[str, Path], references: dict[str, str]
) -> dict[str, float]:
    """All metrics from the samples and the folders of the policies, with transformers alone."""
    models = {name: AutoModelForCausalLM.from_pretrained(path) for name, path in references.items()}
    model = AutoModelForCausalLM.from_pretrained(policies["student"])
    count = len(PROMPTS)
    sums: dict[str, list[float]] = {name: [0.0] * count for name in ("tokens", "right", "entropy", "cut", *references)}
    texts: list[set[tuple[int, ...]]] = [set() for _ in PROMPTS]
    for number, (prompt, response) in enumerate(drawn):
        group = number // SAMPLES
        logp = token_logps(model, prompt, response.ids).detach().double()
        sums["tokens"][group] += len(response.ids)
        sums["entropy"][group] -= float((logp.exp() * logp).sum())
        sums["cut"][group] += response.ids[-1] != 2
        text = [token for token in response.ids if token > 2]
        texts[group].add(tuple(text))
        sums["right"][group] += bool(text) and text[-1] in range(3, 13) and (text[-1] - 3) % 2 == 0
        for name, other in models.items():
            logq = token_logps(other, prompt, response.ids).detach().double()
            sums[name][group] += float((logp.exp() * (logp - logq)).sum())
    samples = [SAMPLES] * count
    result = {}
    result["pass@1"], result["pass@1_stderr"] = ratio(sums["right"], samples)
    result["pass@k"] = float(np.mean([right > 0 for right in sums["right"]]))
    result["entropy_per_token"] = ratio(sums["entropy"], sums["tokens"])[0]
    result["mean_length"] = ratio(sums["tokens"], samples)[0]
    result["truncated"] = ratio(sums["cut"], samples)[0]
    result["distinct"] = sum(len(different) for different in texts) / len(drawn)
    for name in references:
        suffix = "" if name == "base" else f"_to_{name}"
        value, stderr = ratio(sums[name], sums["tokens"])
        result[f"kl_per_token{suffix}"], result[f"kl_per_token{suffix}_stderr"] = value, stderr
        value, stderr = ratio(sums[name], samples)
        result[f"kl_per_response{suffix}"], result[f"kl_per_response{suffix}_stderr"] = value, stderr
    return result


def test_metrics_of_a_policy(evaluation_data: Callable[..., RolloutDataModule], policies: dict[str, Path]) -> None:
    data = evaluation_data(sampler=Recorder(alike=3))
    references = {"base": str(policies["base"]), "first": str(policies["teacher"]), "baseline": str(policies["base"])}
    module = EvaluationModule(policies["student"], references=references)
    trainer = make_trainer()
    trainer.test(module, datamodule=data, verbose=False)
    logged = {name.removeprefix("test/"): float(v) for name, v in trainer.callback_metrics.items()}
    drawn = data.sampler.drawn  # type: ignore[attr-defined]
    assert len(drawn) == len(PROMPTS) * SAMPLES
    assert [prompt for prompt, _ in drawn[:: SAMPLES * 2]] == [
        data.tokenizer(prompt).input_ids for prompt in PROMPTS[::2]
    ]
    expected = measured(drawn, policies, references)
    assert 0 < expected["pass@1"] < expected["pass@k"]
    assert 0 < expected["truncated"] < 1
    assert 1 / SAMPLES < expected["distinct"] < 1
    assert logged == pytest.approx(expected, rel=1e-4)


def test_a_reference_of_another_vocabulary(
    evaluation_data: Callable[..., RolloutDataModule], policies: dict[str, Path], tmp_path: Path
) -> None:
    other = make_model()
    other.resize_token_embeddings(VOCABULARY_SIZE + 5)
    references = {"base": str(save_policy(tmp_path / "other", other))}
    with pytest.raises(UserError, match=r"references.base .* has a vocabulary of 24 tokens, the policy one of 19"):
        make_trainer().test(EvaluationModule(policies["student"], references=references), datamodule=evaluation_data())


def test_pass_at_k_of_fewer_than_all_samples(
    evaluation_data: Callable[..., RolloutDataModule], policies: dict[str, Path]
) -> None:
    data = evaluation_data()
    module = EvaluationModule(policies["student"], pass_at_k=2)
    trainer = make_trainer()
    trainer.test(module, datamodule=data, verbose=False)
    drawn = data.sampler.drawn  # type: ignore[attr-defined]
    tokenizer, shares = data.tokenizer, []
    for group in range(len(PROMPTS)):
        own = [response.ids for _, response in drawn[group * SAMPLES :][:SAMPLES]]
        rewards = Even()(tokenizer.batch_decode(own, skip_special_tokens=True), ["?"] * SAMPLES)
        pairs = list(combinations([bool(reward) for reward in rewards], 2))
        shares.append(sum(any(pair) for pair in pairs) / len(pairs))
    assert 0 < np.mean(shares) < 1
    assert float(trainer.callback_metrics["test/pass@k"]) == pytest.approx(float(np.mean(shares)))
    with pytest.raises(UserError, match="pass_at_k is 5, but only 4"):
        make_trainer().test(EvaluationModule(policies["student"], pass_at_k=5), datamodule=data)


def test_a_policy_is_at_no_distance_from_itself(
    evaluation_data: Callable[..., RolloutDataModule], policies: dict[str, Path]
) -> None:
    trainer = make_trainer()
    trainer.test(EvaluationModule(policies["student"]), datamodule=evaluation_data(), verbose=False)
    assert abs(float(trainer.callback_metrics["test/kl_per_token"])) < 1e-6


class Validations(Callback):
    """Notes what each validation found, and the policies in memory."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []
        self.frozen: dict[int, Any] = {}
        self.during: list[int] = []
        self.training: list[int] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.training.append(len(module._references))

    def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.frozen |= {id(policy): weakref.ref(policy) for policy in module._references.values()}
        self.during.append(len(module._references))

    def on_test_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.on_validation_batch_end(trainer, module)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.found.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    @property
    def alive(self) -> int:
        gc.collect()
        return sum(reference() is not None for reference in self.frozen.values())


def test_each_validation_draws_afresh(
    scored: Path, evaluation_data: Callable[..., RolloutDataModule], policies: dict[str, Path]
) -> None:
    seen = Validations()
    data = evaluation_data(scored, batch_size=8)
    module = ExtremeRegionModule(policies["student"], learning_rate=0.01, warmup_steps=0)
    make_trainer(max_epochs=3, callbacks=[seen]).fit(module, datamodule=data)
    # Two steps an epoch.
    expected = [derive_seed(derive_seed(0, "validation", i), step) for step in (2, 4, 6) for i in range(3)]
    assert data.sampler.seeds == expected  # type: ignore[attr-defined]
    kls = [found["val/kl_per_token"] for found in seen.found]
    assert 0 < kls[0] < kls[1] < kls[2]
    assert "val/pass@1_stderr" in seen.found[0]


@pytest.mark.parametrize(("kl_coef", "estimator"), [(0.0, "exact"), (0.1, "exact"), (0.1, "k2")])
def test_reference_policies_are_let_go(
    scored: Path,
    evaluation_data: Callable[..., RolloutDataModule],
    policies: dict[str, Path],
    kl_coef: float,
    estimator: Any,
) -> None:
    references = {"base": str(policies["base"]), "first": str(policies["teacher"])}
    seen = Validations()
    module = ExtremeRegionModule(policies["student"], references=references, kl_coef=kl_coef, kl_estimator=estimator)
    trainer = make_trainer(max_epochs=2, callbacks=[seen])
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
    scored: Path, evaluation_data: Callable[..., RolloutDataModule], policies: dict[str, Path]
) -> None:
    module = ExtremeRegionModule(policies["base"], kl_coef=1.0, learning_rate=0.01, warmup_steps=0)
    seen = Validations()
    trainer = make_trainer(max_epochs=2, callbacks=[seen])
    trainer.fit(module, datamodule=evaluation_data(scored, batch_size=8))
    frozen = module.reference("base")
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    start = make_model(seed=0)
    for mine, theirs in zip(frozen.model.parameters(), start.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert seen.found[-1]["val/kl_per_token"] > 0
    module.release_references()


# Calibration

BUDGET = 0.1


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
    policies: dict[str, Path], data: RolloutDataModule, calibrate: bool, **how: Any
) -> tuple[DistillModule, Betas]:
    module = DistillModule(
        policies["base"], kl_budget=BUDGET, calibrate=calibrate, learning_rate=0.01, warmup_steps=0, **how
    )
    seen = Betas()
    make_trainer(max_epochs=5, callbacks=[seen], gradient_clip_val=1.0).fit(module, datamodule=data)
    return module, seen


def test_calibration_spends_the_budget_on_fresh_samples(
    scored: Path,
    tmp_path: Path,
    evaluation_data: Callable[..., RolloutDataModule],
    policies: dict[str, Path],
) -> None:
    settings: dict[str, Any] = {
        "scores": scored / "scores",
        "prompts": tmp_path / "prompts.jsonl",
        "prompts_per_round": 2,
        "calibration_prompts": 3,
        "calibration_samples": 8,
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
    # The weights that are exported lie on the line between base and trained student, where the budget is spent.
    assert module.budget.fit is not None
    assert 0 < module.budget.fit.alpha <= MAX_EXTRAPOLATION
    base = load_policy(policies["base"]).state_dict()
    for name, weight in module.policy.state_dict().items():
        expected = base[name] + module.budget.fit.alpha * (seen.trained_weights[name] - base[name])
        torch.testing.assert_close(weight, expected)
    many = evaluation_data(scored, **{**settings, "calibration_samples": 64, "seed": 1})
    reference = DistillModule(tmp_path / "student", kl_budget=BUDGET, references={"base": str(policies["base"])})
    module.export(tmp_path / "student")
    held_out = tmp_path / "unused.jsonl"
    held_out.write_text("".join(json.dumps(vars(prompt)) + "\n" for prompt in many.prompt_plan.calibration))
    many = evaluation_data(scored, validation_prompts=held_out, validation_samples=64, seed=1)
    (measured,) = make_trainer().validate(reference, datamodule=many, verbose=False)
    assert module.budget.fit.kl == BUDGET or module.budget.fit.alpha == MAX_EXTRAPOLATION
    assert measured["val/kl_per_token"] == pytest.approx(module.budget.fit.kl, rel=0.25)


def test_a_student_of_another_start_does_not_land(policies: dict[str, Path]) -> None:
    assert DistillModule(policies["base"]).calibrates
    assert not DistillModule(policies["student"], references={"base": str(policies["base"])}).calibrates


# Settings and export


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


def test_a_schedule_that_needs_more_settings(scored: Path, policies: dict[str, Path]) -> None:
    module = ExtremeRegionModule(policies["base"], lr_scheduler="cosine_with_min_lr")
    with pytest.raises(UserError, match="lr_scheduler is 'cosine_with_min_lr'"):
        make_trainer(max_steps=1).fit(module, datamodule=make_data(scored, policies))


def test_export_of_what_was_trained(scored: Path, policies: dict[str, Path], tmp_path: Path) -> None:
    module = ExtremeRegionModule(policies["base"], warmup_steps=0)
    make_trainer(max_steps=1).fit(module, datamodule=make_data(scored, policies))
    module.export(tmp_path / "one")
    module.export(tmp_path / "two", tokenizer=policies["student"])
    assert policy_fingerprint(tmp_path / "one") == policy_fingerprint(tmp_path / "two")
    assert policy_fingerprint(tmp_path / "one") != module.fingerprint == policy_fingerprint(policies["base"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in module.policy.model.state_dict().items())
