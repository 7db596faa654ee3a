"""The KL budget as a contract, in plain trainers with a module that has a policy and nothing else of ours."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from erpd_lightning.budget.search import Measurement
from erpd_lightning.callbacks import BudgetExceeded, KLBudget
from erpd_lightning.data.samplers import TransformersSampler
from erpd_lightning.errors import UserError
from erpd_lightning.models.policy import load_policy
from support import trainers
from support.policies import TASK, make_model, save_policy, write_prompts

BUDGET = 0.05
PROMPTS = [f"{a}+{b}" for a in range(10, 99, 3) for b in range(10, 99, 3)]  # of one length: no padding


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base policy and prompts."""
    folder = tmp_path_factory.mktemp("budget")
    save_policy(folder / "base", make_model(0))
    write_prompts(folder / "prompts.jsonl", [(prompt, "") for prompt in PROMPTS])
    return folder


class Drifting(LightningModule):
    """A policy that moves away from where it began, with a module around it that knows nothing of ours."""

    def __init__(self, folder: Path, learning_rate: float = 1e-3, seed: int = 0) -> None:
        super().__init__()
        self.policy = AutoModelForCausalLM.from_pretrained(folder / "base").train()
        self.learning_rate = learning_rate
        generator = torch.Generator().manual_seed(seed)
        self.direction = torch.randint(3, 19, (8, 6), generator=generator)
        self.kl_coef = 1.0

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss: Tensor = self.policy(input_ids=self.direction, labels=self.direction).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.policy.parameters(), lr=self.learning_rate)


def make_budget(folder: Path, **settings: Any) -> KLBudget:
    defaults: dict[str, Any] = {
        "budget": BUDGET,
        "reference": str(folder / "base"),
        "prompts": folder / "prompts.jsonl",
        "sampler": TransformersSampler(max_new_tokens=6, batch_size=1024),
        "samples": 1,
        "every_n_steps": 4,
    }
    return KLBudget(**{**defaults, **settings})


def make_trainer(*callbacks: Callback, **settings: Any) -> Trainer:
    return trainers.make_trainer(*callbacks, **{"max_steps": 40, **settings})


STEPS: DataLoader[Any] = DataLoader(torch.zeros(1000, 1))  # type: ignore[arg-type]


def true_kl(model: Any, folder: Path, samples: int = 8, per: str = "token") -> float:
    """KL to the base policy on fresh samples, by plain `transformers` and all logits."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    model.eval()
    ids = torch.tensor(TASK.tokenizer()(PROMPTS).input_ids)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        drawn = model.generate(
            ids, do_sample=True, top_k=0, max_new_tokens=6, num_return_sequences=samples, pad_token_id=0
        )
        logps = [m(input_ids=drawn).logits[:, ids.shape[1] - 1 : -1].log_softmax(-1) for m in (model, base)]
    kl = (logps[0].exp() * (logps[0] - logps[1])).sum(-1)
    response = drawn[:, ids.shape[1] :]
    mask = (response == 2).cumsum(1) - (response == 2).long() == 0  # up to the end and with it
    return float(kl[mask].sum() / (mask.sum() if per == "token" else len(drawn)))


def fit(module: LightningModule, budget: KLBudget, **settings: Any) -> Trainer:
    trainer = make_trainer(budget, **settings)
    trainer.fit(module, STEPS)
    return trainer


# What is measured


def test_it_measures_what_transformers_alone_measures(folder: Path) -> None:
    module = Drifting(folder, learning_rate=0.02)
    for per, most in (("token", 100.0), ("response", 1000.0)):
        budget = make_budget(folder, budget=most, action="stop", per=per, max_prompts=900, samples=4)
        fit(module, budget, max_steps=5)
        assert budget.last is not None
        expected = true_kl(module.policy, folder, per=per)
        assert budget.last.stderr < 0.05 * expected
        assert budget.last.kl == pytest.approx(expected, abs=4 * budget.last.stderr)
        assert budget.upper == pytest.approx(budget.last.kl + 1.6448536 * budget.last.stderr)


def test_standard_errors_count_prompts(folder: Path) -> None:
    """Sixteen chunks of the same few prompts tell no more of other prompts than many samples of each."""
    few, module = folder / "few.jsonl", Drifting(folder, learning_rate=0.05)
    few.write_text("".join((folder / "prompts.jsonl").read_text().splitlines(keepends=True)[::45]))
    again, once = (make_budget(folder, budget=1000, prompts=few, **how) for how in ({"samples": 4}, {"samples": 64}))
    trainer = fit(module, once, max_steps=8)
    found = again._measure(trainer, module, "again", stderr=1e-9)
    assert once.last is not None
    assert found.kl == pytest.approx(once.last.kl, rel=0.05)
    assert found.stderr == pytest.approx(once.last.stderr, rel=0.25)
    assert found.stderr > 0.02 * found.kl


def test_watching_changes_nothing(folder: Path) -> None:
    """The same weights, random state and modes as without it."""
    plain, watched = Drifting(folder), Drifting(folder)
    for module in (plain, watched):
        next(iter(module.policy.children())).eval()  # A part that the user keeps in evaluation mode.
    torch.manual_seed(3)
    make_trainer(max_steps=9).fit(plain, STEPS)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    fit(watched, make_budget(folder, budget=100, every_n_steps=2), max_steps=9)
    assert torch.equal(torch.rand(1), drawn)
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [m.training for m in plain.modules()] == [m.training for m in watched.modules()]


# What follows an overrun


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_an_overrun_at_the_end_is_an_error(folder: Path, action: str, capsys: pytest.CaptureFixture[str]) -> None:
    budget, module = make_budget(folder, action=action), Drifting(folder, learning_rate=0.02)
    with pytest.raises(BudgetExceeded, match=r"KL [\d.]+ ± [\d.]+ nats per token to .*base .*budget 0.05"):
        fit(module, budget)
    assert true_kl(module.policy, folder) > BUDGET
    assert len(budget.reasons) == 1  # A crossing is told of once.
    assert budget.reasons[0] in capsys.readouterr().out.replace("KLBudget, ", "")
    step = int(re.findall(r"step (\d+)", budget.reasons[0])[0])
    assert (module.global_step == step) == (action == "stop")


def test_rollback_takes_the_last_weights_inside(folder: Path) -> None:
    module = Drifting(folder, learning_rate=0.004)
    notes: dict[int, Tensor] = {}

    class Note(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            notes[trainer.global_step] = pl_module.policy.lm_head.weight.detach().clone()

    budget = make_budget(folder, action="rollback")
    make_trainer(Note(), budget, max_steps=400).fit(module, STEPS)
    outside = int(re.findall(r"step (\d+)", budget.reasons[0])[0])
    assert outside >= 8  # Something was measured inside before.
    assert torch.equal(module.policy.lm_head.weight, notes[outside - 4])
    assert budget.upper <= BUDGET
    assert 0 < true_kl(module.policy, folder) < BUDGET


def test_rollback_without_any_weights_inside_is_the_beginning(folder: Path) -> None:
    module = Drifting(folder, learning_rate=0.1)
    fit(module, make_budget(folder, action="rollback"))
    for ours, base in zip(module.policy.parameters(), load_policy(folder / "base").model.parameters(), strict=True):
        assert torch.equal(ours, base)


@pytest.mark.parametrize("seed", range(2))
def test_search_spends_the_budget_and_no_more(folder: Path, seed: int) -> None:
    """Two directions of drift, far outside at the end: inside, and not far, by an independent measurement too."""
    module = Drifting(folder, learning_rate=0.02, seed=seed)
    budget = make_budget(folder, max_prompts=900, seed=seed, tolerance=0.1)
    fit(module, budget)
    assert budget.last is not None
    assert (1 - budget.controller.tolerance) * BUDGET <= budget.last.kl <= budget.upper <= BUDGET
    assert 0.87 <= true_kl(module.policy, folder) / BUDGET <= 1.0


def test_search_at_the_end_alone(folder: Path) -> None:
    """Nothing is measured on the way: the last word is the only one."""
    module = Drifting(folder, learning_rate=0.02)
    trainer = fit(module, make_budget(folder, every_n_steps=1000, tolerance=0.1), max_steps=12)
    assert trainer.global_step == 12
    assert true_kl(module.policy, folder) <= BUDGET


def test_patience_lets_measurements_pass(folder: Path) -> None:
    steps = []
    for patience in (0, 2):
        budget = make_budget(folder, action="stop", patience=patience)
        with pytest.raises(BudgetExceeded):
            fit(Drifting(folder, learning_rate=0.02), budget)
        steps.append(int(re.findall(r"step (\d+)", budget.reasons[0])[0]))
    assert steps[1] == steps[0] + 8


def test_a_coefficient_is_adapted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KL at 1.1, 2 and 0.1 of the budget: the error is clipped at 20 %."""
    found = iter([1.1, 2.0, 0.1, 0.5])
    measure = lambda *_, **__: Measurement(next(found) * BUDGET, 0.0)  # noqa: E731
    monkeypatch.setattr(KLBudget, "_measure", measure)
    module = Drifting(folder)
    fit(module, make_budget(folder, action="adapt", gain=0.5, every_n_steps=1), max_steps=3)
    assert module.kl_coef == pytest.approx(1.05 * 1.1 * 0.9)


# The estimate from training batches


class Telling(Drifting):
    """Tells of made-up tokens: two responses, of two tokens and of one."""

    mask = torch.tensor([[True, True, False], [True, False, False]])
    log_ratio = torch.tensor([[0.3, -0.2, 9.0], [1.5, 9.0, 9.0]])
    growth = 0.0

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        log_ratio = self.log_ratio * (1 + self.growth * self.global_step)
        return {"loss": super().training_step(batch, batch_idx), "mask": self.mask, "log_ratio": log_ratio}


def test_the_estimate_by_hand(folder: Path) -> None:
    """`r log r - r + 1` is what the k3 of `p / q` is under samples of q, with its weight; of the last step alone."""
    terms = [math.exp(x) * x - math.exp(x) + 1 for x in (0.6, -0.4, 3.0)]
    for per, number in (("token", 3), ("response", 2)):
        budget = make_budget(folder, budget=1000, per=per, every_n_steps=1000)
        trainer = make_trainer(budget, max_steps=2, accumulate_grad_batches=3)
        module = Telling(folder)
        module.growth = 1.0
        trainer.fit(module, STEPS)
        assert float(trainer.callback_metrics["kl_budget/estimate"]) == pytest.approx(sum(terms) / number)


def test_an_estimate_outside_asks_for_a_measurement(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: a false alarm is not raised again by the same estimate."""
    asked: list[str] = []

    def measure(self: Any, trainer: Any, module: Any, purpose: str, **_: Any) -> Measurement:
        asked.append(purpose)
        return Measurement(0.01, 0.001)

    monkeypatch.setattr(KLBudget, "_measure", measure)
    fit(Telling(folder), make_budget(folder, every_n_steps=None))
    assert asked == ["step 10", "end"]


# Going on after a kill


def test_state_survives_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    first = make_budget(folder, action="rollback")
    trainer = make_trainer(first, max_steps=6)
    trainer.fit(Drifting(folder, learning_rate=0.004), STEPS)
    trainer.save_checkpoint(tmp_path / "checkpoint.ckpt")
    whole, resumed = (make_budget(folder, action="rollback") for _ in range(2))
    modules = [Drifting(folder, learning_rate=0.004) for _ in range(2)]
    make_trainer(whole, max_steps=60).fit(modules[0], STEPS)
    make_trainer(resumed, max_steps=60).fit(
        modules[1], STEPS, ckpt_path=tmp_path / "checkpoint.ckpt", weights_only=True
    )
    assert whole.reasons == resumed.reasons != []
    for a, b in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("action", ["rollback", "search"])
def test_what_was_brought_back_is_not_trained_again(folder: Path, tmp_path: Path, action: str) -> None:
    settings: dict[str, Any] = {"action": action, "tolerance": 0.1}
    budget, module = make_budget(folder, **settings), Drifting(folder, learning_rate=0.02)
    trainer = fit(module, budget)
    trainer.save_checkpoint(tmp_path / "checkpoint.ckpt")
    again, other = make_budget(folder, **settings), Drifting(folder, learning_rate=0.02)
    make_trainer(again, max_steps=400).fit(other, STEPS, ckpt_path=tmp_path / "checkpoint.ckpt", weights_only=True)
    assert again.reasons == budget.reasons
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


# Mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0.0}, "^budget is 0.0: it must be a positive"),
        ({"budget": -1.0}, "^budget is -1.0"),
        ({"budget": math.nan}, "^budget is nan"),
        ({"action": "hope"}, "^action is 'hope': it must be one of warn, stop, rollback, search, adapt"),
        ({"per": "word"}, "^per is 'word'"),
        ({"confidence": 1.0}, "^confidence is 1.0"),
        ({"confidence": 0.5}, "^confidence is 0.5: it must lie between 0.5 and 1"),
        ({"tolerance": 0.0}, "^tolerance is 0.0"),
        ({"max_prompts": 0}, "max_prompts"),
        ({"gain": 5.0}, "^gain is 5.0"),
    ],
)
def test_settings_out_of_range(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_budget(folder, **settings)


def test_what_cannot_be_measured_is_refused_before_training(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"reference": "teacher"}, r"KLBudget.reference is 'teacher': .*\(none\)"),
        ({"prompts": tmp_path / "empty.jsonl"}, "empty.jsonl holds no prompts"),
        ({"prompts": None}, "KLBudget.prompts is missing"),
        ({"action": "adapt", "coefficient": "beta"}, "Drifting has no positive beta to adapt"),
    ]
    for settings, message in cases:
        module = Drifting(folder)
        with pytest.raises(UserError, match=message):
            fit(module, make_budget(folder, **settings))
        assert module.global_step == 0


def test_a_kl_that_is_no_number_ends_training(folder: Path) -> None:
    class Breaking(Drifting):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == 3:
                with torch.no_grad():
                    self.policy.model.embed_tokens.weight.fill_(math.nan)

    with pytest.raises(UserError, match="optimiser step 4: a weight of the policy is not a number"):
        fit(Breaking(folder), make_budget(folder))


# The example in the documentation


def test_the_documented_example(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "kl_budget.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "base").symlink_to(folder / "base")
    (tmp_path / "prompts.jsonl").symlink_to(folder / "prompts.jsonl")
    (tmp_path / "texts.txt").write_text("\n".join("1+2=3;" * 2 for _ in range(12)))
    monkeypatch.chdir(tmp_path)
    quiet = "callbacks=[budget], enable_checkpointing=False, logger=False, enable_progress_bar=False, accelerator='cpu'"
    names: dict[str, Any] = {}
    exec(compile(example.replace("callbacks=[budget]", quiet), "kl_budget.md", "exec"), names)
    assert names["budget"].upper <= 0.05
