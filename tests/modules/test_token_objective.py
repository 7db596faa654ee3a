"""Distillation by the signal of sampled tokens, stored or the student's own, against plain loops; old log-probs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from erpd_lightning.data.batching import RolloutBatch
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samplers import TransformersSampler
from erpd_lightning.data.store import Store
from erpd_lightning.errors import UserError
from erpd_lightning.modules.distill import DistillModule
from erpd_lightning.modules.extreme_region import ExtremeRegionModule
from erpd_lightning.modules.old_logps import OldLogps
from erpd_lightning.modules.policy_module import PolicyModule
from erpd_lightning.objectives.clipped import PPOClip
from erpd_lightning.objectives.distillation import ClippedPolicyGradient, TiltedTarget
from support.chain import arguments
from support.kills import CHECKPOINT, MODULE, Kill, after, written
from support.modules import CLIP, NAMES
from support.policies import make_model, make_rows, token_logps, write_prompts
from support.runs import Runs, contents
from support.trainers import fake_trainer, make_trainer

BETA, TRUNCATE = 0.7, 2.0
PROMPTS = ["1+1=", "2*3-1=", "4-1=", "5*2+3=", "7+2="]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: make_model(seed) for seed, name in enumerate(NAMES[:3])}


@pytest.fixture
def make_data(scored: Path, tmp_path: Path, policies: dict[str, str]) -> Callable[..., RolloutDataModule]:
    prompts = write_prompts(tmp_path / "prompts.jsonl", [(prompt, "?") for prompt in PROMPTS])

    def make(**settings: Any) -> RolloutDataModule:
        defaults: dict[str, Any] = {
            "scores": scored / "scores",
            "on_policy_store": tmp_path / "fresh",
            "prompts": prompts,
            "sampler": TransformersSampler(6, batch_size=16),
            "group_size": 4,
            "batch_size": 100,
        }
        return RolloutDataModule(scored / "rollouts", policies["base"], **{**defaults, **settings})

    return make


def make_student(folders: dict[str, str], /, start: str = "student", **settings: Any) -> DistillModule:
    """A student that is no longer the base policy, so that there is a KL between them."""
    defaults: dict[str, Any] = {
        "kl_budget": None,
        "beta": BETA,
        "objective": ClippedPolicyGradient(truncate=TRUNCATE),
        "learning_rate": 0.01,
        "warmup_steps": 0,
        "references": {"base": folders["base"]},
    }
    return DistillModule(folders[start], **{**defaults, **settings})


class Watch(Callback):
    """Notes the first gradient, each step's batch and old log-probs, and the weights when each epoch began."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.began: list[dict[str, Tensor]] = []
        self.old_logps: list[tuple[int, RolloutBatch, Tensor]] = []

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        weights = module.policy.model.state_dict()
        self.began.append({name: value.clone() for name, value in weights.items()})

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if not self.gradients:
            named = module.policy.model.named_parameters()
            self.gradients = {name: parameter.grad.clone() for name, parameter in named}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.old_logps.append((trainer.current_epoch, batch, module._old_logps.logps(batch)))


def of_tokens(logps: Tensor, row: dict[str, Any]) -> Tensor:
    return logps.gather(1, torch.tensor(row["response_ids"])[:, None])[:, 0]


def own_loss(models: dict[str, Any], student: Any, rows: list[dict[str, Any]]) -> Tensor:
    """The loss of a first step, where pi_old is the student itself: the mean over all response tokens."""
    total, tokens = torch.zeros(()), 0
    for row in rows:
        logps = {name: token_logps(model, row["prompt_ids"], row["response_ids"]) for name, model in models.items()}
        logps = {name: value.detach() for name, value in logps.items()}
        own = token_logps(student, row["prompt_ids"], row["response_ids"])
        chosen = of_tokens(own, row)
        signal = of_tokens((logps["teacher"] - logps["unlearned"]).clamp(-CLIP, CLIP), row)
        weight = (chosen.detach() - torch.tensor(row["logps"])).exp().clamp(max=TRUNCATE)
        ratio = (chosen - chosen.detach()).exp()
        kl = (own.exp() * (own - logps["base"])).sum(-1)
        total = total + (BETA * kl - weight * ratio * signal).sum()
        tokens += len(row["response_ids"])
    return total / tokens


def check_first_step(watch: Watch, trainer: Trainer, models: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    student = make_model(3)
    loss = own_loss(models, student.train(), rows)
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(float(loss.detach()), rel=1e-3, abs=1e-5)
    loss.backward()
    expected = {name: parameter.grad for name, parameter in student.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(watch.gradients[name], gradient, atol=1e-4 * largest, rtol=1e-3)


@pytest.mark.parametrize("max_tokens", [16384, 60])
def test_a_step_on_stored_rollouts(
    make_data: Callable[..., RolloutDataModule], policies: dict[str, str], models: dict[str, Any], max_tokens: int
) -> None:
    watch = Watch()
    trainer = make_trainer(watch, max_steps=1)
    trainer.fit(make_student(policies), datamodule=make_data(max_tokens=max_tokens))
    weights = torch.cat([(old - batch.sampler_logps)[batch.mask].exp() for _, batch, old in watch.old_logps])
    assert (weights > TRUNCATE).any()
    assert (weights < TRUNCATE).any()
    check_first_step(watch, trainer, models, make_rows())


def test_a_step_on_its_own_rollouts(
    make_data: Callable[..., RolloutDataModule], policies: dict[str, str], models: dict[str, Any]
) -> None:
    """Of the first part of the prompts; the signal is that of the policies beside it, and nothing is verified."""
    watch, data = Watch(), make_data()
    trainer = make_trainer(watch, max_epochs=5, max_steps=1)
    trainer.fit(make_student(policies, iterations=5, policies=policies), datamodule=data)
    rows = Store.open(data.train_data.store).table().to_pylist()
    assert [row["prompt"] for row in rows] == 4 * PROMPTS[:1]
    assert not any(row["checked"] for row in rows)
    check_first_step(watch, trainer, models, rows)


def test_a_target_on_its_own_rollouts(
    make_data: Callable[..., RolloutDataModule],
    policies: dict[str, str],
    models: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("erpd_lightning.modules.distill.SUPPORT_MASS", 1.0)
    data, trainer = make_data(), make_trainer(max_epochs=5, max_steps=1)
    student = make_student(policies, objective=TiltedTarget(), iterations=5, policies=policies)
    trainer.fit(student, datamodule=data)
    total, tokens = 0.0, 0
    for row in Store.open(data.train_data.store).table().to_pylist():
        logps = {n: token_logps(m, row["prompt_ids"], row["response_ids"]).detach() for n, m in models.items()}
        signal = (logps["teacher"] - logps["unlearned"]).clamp(-CLIP, CLIP)
        target = (logps["base"] + signal / BETA).log_softmax(-1)
        own = token_logps(make_model(3), row["prompt_ids"], row["response_ids"]).detach()
        total += float((own.exp() * (own - target)).sum())
        tokens += len(row["response_ids"])
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(total / tokens, rel=1e-4)


def test_beta_is_solved_on_the_stored_rollouts(
    make_data: Callable[..., RolloutDataModule], policies: dict[str, str]
) -> None:
    """Whichever rollouts are trained on, and again after calibration has looked at fresh ones."""
    settings: dict[str, Any] = {"kl_budget": 0.05, "beta": None, "calibrate": False}
    stored, fresh = (
        make_student(policies, **settings, iterations=n, policies=policies if n > 1 else None) for n in (1, 5)
    )
    for student in (stored, fresh):
        make_trainer(max_epochs=5, max_steps=1).fit(student, datamodule=make_data())
    assert stored.budget.solution is not None
    assert stored.budget.solution == fresh.budget.solution


# Old log-probs


def make_teacher(policies: dict[str, str], **settings: Any) -> ExtremeRegionModule:
    return ExtremeRegionModule(
        policies["base"], objective=PPOClip(), old_policy="iteration", learning_rate=0.01, warmup_steps=0, **settings
    )


CASES: dict[str, tuple[Callable[..., PolicyModule], dict[str, Any], list[int]]] = {
    "stored": (make_student, {}, [0, 1, 2, 3]),
    "own": (lambda p: make_student(p, iterations=2, policies=p), {}, [0, 0, 2, 2]),
    "extreme region": (make_teacher, {}, [0, 1, 2, 3]),
}
"""Who trains for four epochs, on what, and the epoch whose beginning the old log-probs are of in each of them."""


@pytest.mark.parametrize("case", CASES)
def test_old_logps_are_of_the_policy_as_the_iteration_began(
    case: str, make_data: Callable[..., RolloutDataModule], policies: dict[str, str]
) -> None:
    make, settings, begins = CASES[case]
    watch, data = Watch(), make_data(batch_size=4, max_tokens=60, **settings)
    module = make(policies)
    make_trainer(watch, max_epochs=4).fit(module, datamodule=data)
    moved = 0.0
    for epoch, batch, found in watch.old_logps:
        for number in {begins[epoch], epoch}:
            module.policy.model.load_state_dict(watch.began[number])
            with torch.no_grad():
                expected = module.policy.token_logps(batch).logps
            difference = float((found - expected).abs().max())
            if number == begins[epoch]:
                assert difference < 1e-4
            moved = max(moved, difference)
        assert (found[~batch.mask] == 0).all()
    if case == "own":
        assert moved > 0.01
    first = [found for epoch, _, found in watch.old_logps if epoch == 0]
    assert len(first) > 1


def test_ranks_share_the_work_of_old_logps(
    make_data: Callable[..., RolloutDataModule], policies: dict[str, str]
) -> None:
    """Each of three ranks asks about its rows, with a dummy micro-batch where they are too few; the sum is all."""
    module = make_student(policies)
    module.configure_model()
    parts, seen = [], []
    whole = OldLogps()
    for world_size in (1, 3):
        for rank in range(world_size):
            data = make_data(batch_size=3, max_tokens=60)
            data.trainer = fake_trainer(rank, world_size)
            data.train_dataloader()
            batches = list(data.iterate_once())
            old_logps = whole if world_size == 1 else OldLogps()
            offsets = data.rollouts.response_offsets
            old_logps.take(module.policy, offsets, batches, torch.device("cpu"), lambda logps: logps)
            if world_size > 1:
                parts.append(old_logps.state_dict()["logps"])
                seen.append(len(batches))
                assert any(bool((batch.rows < 0).all()) for batch in batches) or rank == 0
    assert len(set(seen)) == 1
    assert all(bool((a * b == 0).all()) for a, b in zip(parts, parts[1:] + parts[:1], strict=True))
    torch.testing.assert_close(sum(parts), whole.state_dict()["logps"], atol=1e-5, rtol=1e-5)
    assert (whole.state_dict()["logps"] < 0).all()


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DistillModule("p", iterations=0), "^iterations is 0"),
        (
            lambda: DistillModule("p", kl_budget=None, beta=1.0, objective=ClippedPolicyGradient(kl_term=False)),
            "^objective.kl_term is false",
        ),
        (
            lambda: DistillModule("p", calibrate=False, objective=ClippedPolicyGradient(kl_term=False)),
            "^objective.kl_term is false",
        ),
        (lambda: ExtremeRegionModule("p", old_policy="first"), "^old_policy is 'first'"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_are_refused(make: Callable[[], PolicyModule], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_a_budget_may_stand_in_for_the_kl_term_where_it_is_kept(
    make_data: Callable[..., RolloutDataModule], policies: dict[str, str]
) -> None:
    free: dict[str, Any] = {"kl_budget": 0.05, "beta": None, "objective": ClippedPolicyGradient(kl_term=False)}
    with pytest.raises(UserError, match="kl_term is false"):
        make_trainer(max_steps=1).fit(make_student(policies, start="base", **free), datamodule=make_data())
    held = make_data(prompts_per_round=3)
    make_trainer(fast_dev_run=True).fit(make_student(policies, start="base", **free), datamodule=held)


def test_its_own_rollouts_need_a_place_and_policies(
    make_data: Callable[..., RolloutDataModule], policies: dict[str, str]
) -> None:
    with pytest.raises(UserError, match=r"^iterations is 2: .* policies names no teacher, unlearned"):
        make_trainer(max_epochs=2).fit(make_student(policies, iterations=2), datamodule=make_data())
    student = make_student(policies, iterations=2, policies=policies)
    with pytest.raises(UserError, match=r"^iterations is 2: RolloutDataModule\(on_policy_store=…\)"):
        make_trainer(max_epochs=2).fit(student, datamodule=make_data(on_policy_store=None))
    with pytest.raises(UserError, match=r"must be a multiple of iterations \(2\)"):
        make_trainer(max_epochs=3).fit(student, datamodule=make_data())


# The chain

CLIPPED = "erpd_lightning.objectives.distillation.ClippedPolicyGradient"

RUNS: dict[str, tuple[dict[str, Any], list[Kill]]] = {
    "stored": (
        {"distill.objective": CLIPPED, "data.batch_size": 16, "extreme_region.old_policy": "iteration"},
        [
            Kill("erpd_lightning.modules.old_logps:OldLogps.take", count=2, trains=True),
            Kill(f"{MODULE}.training_step", count=12, trains=True),
            after(written(CHECKPOINT, count=2, trains=True)),
            Kill(f"{MODULE}.export"),
        ],
    ),
    "own": (
        {"distill.objective": CLIPPED, "data.batch_size": 16, "distill.iterations": 2, "distill_trainer.max_epochs": 4},
        [
            written(r"distill/rollouts/iteration-0001/part-00000\.parquet"),
            Kill(f"{MODULE}.training_step", count=9, trains=True),
            written("distill/rollouts/iteration-0002/manifest.json", trains=True),
            after(written("distill/rollouts/iteration-0002/manifest.json", trains=True)),
            after(written(CHECKPOINT, count=2, trains=True)),
            Kill(f"{MODULE}.export"),
        ],
    ),
}
"""What is run, and where its distillation is killed."""


@pytest.mark.parametrize("case", RUNS)
def test_killed_at_any_point_it_ends_the_same(case: str, runs: Runs, tmp_path: Path) -> None:
    overrides, kills = RUNS[case]
    settings = {**overrides, "data.max_tokens": 64}
    runs.run(arguments(tmp_path / "killed", **settings), after(written("scoring/stage.json")))
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")
    runs.run(arguments(tmp_path / "alone", **settings))
    resumed: list[int] = []
    for kill in kills:
        steps, _ = runs.run(arguments(tmp_path / "killed", **settings), kill)
        resumed += steps[:1]
    steps, _ = runs.run(arguments(tmp_path / "killed", **settings))
    assert max(resumed) > 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "alone")
    (entry,) = json.loads((tmp_path / "alone" / "summary.json").read_text())["rounds"]
    assert entry["rollouts"] == entry["rollouts_total"] == 16 * 8
    assert entry["on_policy_rollouts"] == (16 * 8 if case == "own" else 0)
    assert entry["policies"]["student"]["kl_per_token"] > 0


def test_two_processes(runs: Runs, tmp_path: Path) -> None:
    """They share the work of the old log-probs and of the answers."""
    overrides, _ = RUNS["own"]
    two = {**overrides, "trainer.devices": 2, "trainer.strategy": "ddp"}
    runs.run(arguments(tmp_path / "two", **two), processes=2)
    (entry,) = json.loads((tmp_path / "two" / "summary.json").read_text())["rounds"]
    assert entry["on_policy_rollouts"] == 16 * 8
    assert entry["policies"]["student"]["kl_per_token"] > 0
