"""Extreme region against plain loops over unpadded sequences with all logits: losses and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from erpd_lightning.errors import UserError
from erpd_lightning.modules.extreme_region import ExtremeRegionModule
from erpd_lightning.modules.policy_module import PolicyModule
from erpd_lightning.objectives.clipped import GSPO
from erpd_lightning.objectives.extreme import SAPO, CrossEntropy, ExtremeObjective
from erpd_lightning.objectives.regression import SquaredError
from support import reference
from support.modules import (
    FirstStep,
    assert_same_gradients,
    first_step,
    gradients_of,
    make_data,
    make_trainer,
    sampled_logps,
)
from support.policies import make_model, token_logps
from support.trainers import fake_trainer


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


@pytest.mark.parametrize("max_tokens", [10_000, 40])
@pytest.mark.parametrize("sign", [1, -1])
def test_gradient_of_the_extreme_region(
    scored: Path, policies: dict[str, str], rows: list[dict[str, Any]], max_tokens: int, sign: int
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
    scored: Path, policies: dict[str, str], rows: list[dict[str, Any]], direction: Any
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
    policies: dict[str, str],
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
    trainer = make_trainer(seen, max_steps=1)
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
def test_a_kl_term_of_the_wrong_gradient(policies: dict[str, str], settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=rf"^kl_estimator is 'k[123]': {expected}") as error:
        ExtremeRegionModule(policies["base"], kl_coef=0.1, **settings)
    assert len(str(error.value).splitlines()) == 1


def test_cross_entropy_is_the_models_own_loss(
    scored: Path, policies: dict[str, str], rows: list[dict[str, Any]]
) -> None:
    module = ExtremeRegionModule(policies["student"], objective=CrossEntropy())
    gradients, loss = first_step(module, make_data(scored, policies, max_tokens=50))
    model = make_model(seed=3)
    correct = [row for row in rows if row["reward"] == 1]
    assert 0 < len(correct) < len(rows)
    width = max(len(row["prompt_ids"]) + len(row["response_ids"]) for row in correct)
    ids, labels, attention = (torch.zeros(len(correct), width, dtype=torch.long) for _ in range(3))
    labels -= 100
    for number, row in enumerate(correct):
        prompt, response = row["prompt_ids"], row["response_ids"]
        ids[number, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
        labels[number, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
        attention[number, : len(prompt) + len(response)] = 1
    expected = model(input_ids=ids, attention_mask=attention, labels=labels).loss
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients, gradients_of(model, expected))


def test_cross_entropy_with_the_sign_flipped_learns_incorrect_responses(
    scored: Path, policies: dict[str, str], rows: list[dict[str, Any]]
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
    scored: Path, policies: dict[str, str], rows: list[dict[str, Any]], max_tokens: int, kl_coef: float, sign: int
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


@pytest.mark.parametrize("dummies", [0, 3])
def test_dummy_rows_of_a_batch_do_not_count(
    scored: Path, policies: dict[str, str], rows: list[dict[str, Any]], dummies: int
) -> None:
    data = make_data(scored, policies)
    module = ExtremeRegionModule(policies["student"], objective=GSPO())
    module.trainer = fake_trainer()
    data.trainer = fake_trainer()
    (batch,) = data.train_dataloader()
    assert batch.step_responses == len(rows)
    module.configure_model()
    expected = module.training_step(batch, 0)["loss"]
    batch.mask[:dummies] = False
    losses, _ = module.batch_loss(batch)
    assert (losses[:dummies] != 0).all()
    loss = module.training_step(batch, 0)["loss"]
    assert loss.item() == pytest.approx(float(losses[dummies:].sum()) / len(rows))
    assert dummies == 0 or loss != expected


class Misshapen(ExtremeObjective):
    """Says one thing and gives another."""

    def select(self, rewards: Tensor, advantages: Tensor) -> Tensor:
        return advantages != 0

    def __call__(self, logps: Tensor, *_: Tensor) -> Tensor:
        return -logps.sum(-1)


def test_terms_of_another_shape_than_announced(scored: Path, policies: dict[str, str]) -> None:
    module = ExtremeRegionModule(policies["base"], objective=Misshapen())
    with pytest.raises(
        UserError, match=r"^objective is Misshapen, which gave a loss of shape \(\d+,\); with per = 'token' it must be"
    ):
        make_trainer(max_steps=1).fit(module, datamodule=make_data(scored, policies))
