"""One temperature on both sides: a policy is asked about rollouts at the temperature that they were drawn at."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from erpd_lightning.callbacks.fresh_kl import FreshKL
from erpd_lightning.data.batching import RolloutBatch, RolloutTable
from erpd_lightning.data.loader import micro_batches
from erpd_lightning.data.prompt_batches import PromptBatch
from erpd_lightning.data.prompts import Prompt
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samplers import TransformersSampler
from erpd_lightning.data.store import Store
from erpd_lightning.data.verifiers import Unverified
from erpd_lightning.errors import InvalidArgument, UserError
from erpd_lightning.models.policy import Policy
from erpd_lightning.modules.distill import DistillModule
from erpd_lightning.modules.evaluation import prompt_sums
from erpd_lightning.modules.extreme_region import ExtremeRegionModule
from erpd_lightning.objectives.clipped import PPOClip
from support.policies import TASK, make_model, make_rows, save_policy, token_logps, write_prompts, write_rollouts
from support.trainers import make_trainer, run_prediction

HOT, COLD = 1.6, 0.6


def prompts(sampler: TransformersSampler, samples: int = 8) -> PromptBatch:
    tokenizer = TASK.tokenizer()
    tokenizer.padding_side = "left"
    asked = [Prompt(f"{i}+1:", "1") for i in range(8)]
    ids = [tokenizer(prompt.prompt).input_ids for prompt in asked]
    return PromptBatch(0, asked, ids, range(8), samples, 0, 10**6, tokenizer, sampler, Unverified())


def drawn(model: Any, temperature: float) -> tuple[RolloutBatch, pa.Table]:
    table = prompts(TransformersSampler(8, temperature)).respond(model)
    (batch,) = micro_batches(RolloutTable.from_arrow(table), 10**6)
    return batch, table


@pytest.mark.parametrize("temperature", [COLD, 1.0, HOT])
def test_ratios_of_an_untouched_policy_are_one(temperature: float) -> None:
    model = make_model()
    batch, _ = drawn(model, temperature)
    assert batch.temperature == temperature
    with torch.no_grad():
        ratios = (Policy(model).token_logps(batch).logps - batch.sampler_logps)[batch.mask].exp()
    torch.testing.assert_close(ratios, torch.ones_like(ratios), atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [COLD, HOT])
def test_what_a_policy_is_asked_by_the_obvious_way(temperature: float) -> None:
    """Log-probs, entropy, KL in both directions, support and tail, from all logits over the temperature."""
    model, other = make_model(0), make_model(1)
    batch, table = drawn(model, temperature)
    policy, reference = Policy(model), Policy(other)
    rows = table.to_pylist()
    with torch.no_grad():
        stats = policy.token_logps(batch)
        reverse = policy.divergence(reference, batch).kl
        forward = policy.divergence(reference, batch, direction="forward").kl
        ids = policy.select_support(batch, 0.9, 4)
        support = policy.support_logps(batch, ids)
        for b, row in enumerate(batch.rows.tolist()):
            prompt, response = rows[row]["prompt_ids"], rows[row]["response_ids"]
            p, q = (token_logps(m, prompt, response, temperature) for m in (model, other))
            n = len(response)
            own = p.gather(1, torch.tensor(response)[:, None])[:, 0]
            torch.testing.assert_close(stats.logps[b, :n], own, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(stats.entropy[b, :n], -(p.exp() * p).sum(-1), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(reverse[b, :n], (p.exp() * (p - q)).sum(-1), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(forward[b, :n], (q.exp() * (q - p)).sum(-1), atol=1e-4, rtol=1e-4)
            for t in range(n):
                kept = [i for i in ids[b, t].tolist() if i >= 0]
                # The fewest of the tempered policy's top entries that hold the mass.
                assert set(kept) == set(p[t].topk(len(kept)).indices.tolist())
                assert len(kept) == 4 or p[t, kept].exp().sum() >= 0.9
                torch.testing.assert_close(support[b, t, : len(kept)], p[t, kept], atol=1e-4, rtol=1e-4)
                tail = math.log(max(1 - float(p[t, kept].exp().sum()), 1e-40))
                assert float(support[b, t, -1]) == pytest.approx(tail, abs=1e-2)


def test_evaluation_measures_the_policy_that_responds() -> None:
    model, other = make_model(0), make_model(1)
    batch = prompts(TransformersSampler(8, HOT), samples=4)
    table = batch.respond(model)
    sums = prompt_sums(Policy(model), {"base": Policy(other)}.__getitem__, ["base"], table, batch)
    kl = torch.zeros(8, dtype=torch.float64)
    for row in table.to_pylist():
        with torch.no_grad():
            p, q = (token_logps(m, row["prompt_ids"], row["response_ids"], HOT) for m in (model, other))
        kl[row["group"]] += (p.exp() * (p - q)).sum().double()
    torch.testing.assert_close(sums["base"], kl, atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("temperature")
    for seed, name in enumerate(("base", "teacher", "unlearned")):
        save_policy(folder / name, make_model(seed))
    rows = make_rows()
    for row in rows:
        logps = token_logps(make_model(0), row["prompt_ids"], row["response_ids"], HOT)
        row["logps"] = logps.gather(1, torch.tensor(row["response_ids"])[:, None])[:, 0].tolist()
        row["temperature"] = HOT
    write_rollouts(folder / "rollouts", rows)
    data = make_data(folder)
    for name in ("base", "teacher", "unlearned"):
        run_prediction(data.scoring(name), folder / name)
    return folder


def make_data(folder: Path, **settings: Any) -> RolloutDataModule:
    return RolloutDataModule(
        folder / "rollouts", folder / "base", **{"scores": folder / "scores", "batch_size": 100, **settings}
    )


def outputs_of(module: Any, data: RolloutDataModule) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    class Note(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            if not seen:
                seen.update(outputs)

    make_trainer(Note(), max_steps=1).fit(module, datamodule=data)
    return seen


def test_no_token_is_clipped_before_anything_is_trained(folder: Path) -> None:
    module = ExtremeRegionModule(folder / "base", objective=PPOClip(), kl_coef=0.1, learning_rate=1e-9)
    seen = outputs_of(module, make_data(folder, scores=None))
    assert seen["log_ratio"][seen["mask"]].abs().max() < 1e-3
    assert seen["kl"][seen["mask"]].abs().max() < 1e-5


def test_scores_and_budget_are_of_the_tempered_policies(folder: Path) -> None:
    rows = make_rows()
    stored = Store.open(folder / "scores" / "teacher").table().to_pylist()
    for score in stored:
        row = rows[score["row"]]
        with torch.no_grad():
            p = token_logps(make_model(1), row["prompt_ids"], row["response_ids"], HOT)
        own = p.gather(1, torch.tensor(row["response_ids"])[:, None])[:, 0]
        assert score["logps"] == pytest.approx(own.tolist(), abs=1e-4)
    module = DistillModule(folder / "base", kl_budget=0.05, calibrate=False, learning_rate=1e-9)
    seen = outputs_of(module, make_data(folder))
    # The student is the base policy: on the stored supports it is at no distance from the stored scores.
    assert seen["kl"][seen["mask"]].abs().max() < 1e-5
    assert module.budget.solution is not None
    assert module.budget.solution.kl_base == pytest.approx(0.05, rel=1e-3)


def test_two_temperatures_do_not_mix(folder: Path, tmp_path: Path) -> None:
    write_rollouts(tmp_path / "earlier", make_rows(seed=1))
    data = make_data(folder, scores=None, replay_stores=[tmp_path / "earlier"], replay=1)
    message = r"drawn at the temperatures 1, 1\.6; .* train on rollouts of one temperature"
    with pytest.raises(UserError, match=message):
        make_trainer(max_steps=1).fit(ExtremeRegionModule(folder / "base"), datamodule=data)


def test_nothing_is_sampled_at_another_temperature_than_the_stored_rollouts(folder: Path, tmp_path: Path) -> None:
    """Budget and ratios would be of the policy at the one, what is measured of it at the other."""
    held_out = write_prompts(tmp_path / "prompts.jsonl", [("1+1:", "2")])
    settings: dict[str, Any] = {"validation_prompts": held_out, "scores": None}
    data = make_data(folder, **settings)
    with pytest.raises(
        InvalidArgument, match=r"^sampler\.temperature is 1, but the stored rollouts were drawn at 1\.6"
    ):
        make_trainer(max_steps=1).fit(ExtremeRegionModule(folder / "base"), datamodule=data)
    data = make_data(folder, sampler=TransformersSampler(4, HOT), **settings)
    make_trainer(max_steps=1).fit(ExtremeRegionModule(folder / "base"), datamodule=data)


@pytest.mark.parametrize(("own", "expected"), [(None, HOT), (COLD, COLD)])
def test_a_budget_on_prompts_of_its_own_is_measured_as_the_rollouts_were_sampled(
    own: float | None, expected: float, folder: Path, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", [("1+1:", "2")])
    sampler = None if own is None else TransformersSampler(4, own)
    fresh_kl = FreshKL(str(folder / "base"), "token", prompts, None, sampler, 1, 1, 0)
    trainer = make_trainer(max_steps=1)
    vars(trainer)["datamodule"] = make_data(folder, sampler=TransformersSampler(4, HOT))
    trainer.strategy.connect(ExtremeRegionModule(folder / "base"))
    batcher, _ = fresh_kl._find_prompts(trainer)
    assert batcher.sampler.temperature == expected
