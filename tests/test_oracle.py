"""The student of a small run against decoding from its target directly, and the summary against transformers alone.

Nothing of the package is used to sample or to measure here: the loops below know models, folders and formulas.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from erpd_lightning.cli.main import ERPDCLI
from support.chain import arguments

BUDGET = 0.05
CLIP = 3.0
EOS = 2
LONGEST = 14
SAMPLES = 16

# A base policy that is correct two times in five after ten seconds of training, and a mild teacher.
OVERRIDES: dict[str, Any] = {
    "task.operations": 2,
    "task.train_prompts": 640,
    "task.validation_prompts": 128,
    "task.demonstrations": 12288,
    "task.misconceived": 0.4,
    "task.hidden_size": 64,
    "task.epochs": 2,
    "task.batch_size": 128,
    "task.learning_rate": 0.01,
    "data.prompts_per_round": 192,
    "data.group_size": 8,
    "data.batch_size": 96,
    "data.validation_samples": 8,
    "data.sampler.max_new_tokens": LONGEST,
    "extreme_region.learning_rate": 0.0005,
    "extreme_region_trainer.max_epochs": 3,
    "distill.kl_budget": BUDGET,
    "distill.calibrate": "false",  # One beta for the whole of the distillation.
    "distill_trainer.max_epochs": 4,
    "checkpoint_every": 1000,
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["erpd_lightning"])
        ERPDCLI(args=arguments(path, "fit", **OVERRIDES))
    return path


@pytest.fixture(scope="module")
def summary(run_dir: Path) -> dict[str, Any]:
    (entry,) = json.loads((run_dir / "summary.json").read_text())["rounds"]
    return dict(entry)


@pytest.fixture(scope="module")
def models(run_dir: Path) -> dict[str, Any]:
    folder = run_dir / "round-1"
    paths = {
        "base": run_dir / "base",
        "teacher": folder / "extreme_region" / "teacher",
        "unlearned": folder / "unlearned" / "policy",
        "student": folder / "distill" / "student",
    }
    return {name: AutoModelForCausalLM.from_pretrained(path).eval() for name, path in paths.items()}


@pytest.fixture(scope="module")
def prompts(run_dir: Path) -> list[dict[str, str]]:
    lines = (run_dir / "prompts" / "validation.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@dataclass
class Samples:
    """What is known of the responses, `(prompts, samples)` each: sums over their tokens, in nats."""

    correct: Tensor
    kl: Tensor
    entropy: Tensor
    tokens: Tensor

    def rate(self, values: Tensor) -> float:
        """A mean over all sampled tokens."""
        return float(values.sum() / self.tokens.sum())


def within_stderr(x: Tensor, y: Tensor, samples: int) -> float:
    """Standard error of `sum x / sum y` over `samples` responses to each prompt, for given prompts."""
    residuals = x - x.sum() / y.sum() * y
    return float((residuals.var(dim=1).mean() / (samples * len(x))).sqrt() / y.mean())


def paired_stderr(differences: Tensor) -> float:
    """Standard error of the mean of what was found prompt by prompt."""
    return float(differences.std() / len(differences) ** 0.5)


def encode(run_dir: Path, prompts: list[dict[str, str]]) -> Tensor:
    """All prompts, `SAMPLES` times each; they are of one length."""
    ids = AutoTokenizer.from_pretrained(run_dir / "base")([row["prompt"] for row in prompts]).input_ids
    return torch.tensor(ids).repeat_interleave(SAMPLES, dim=0)


def measure(
    run_dir: Path, prompts: list[dict[str, str]], responses: Tensor, logps: Tensor, base_logps: Tensor
) -> Samples:
    """Responses `(N, T)` with the log-probs `(N, T, V)` of the policy that drew them, and of the base policy."""
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "base")
    ended = responses == EOS
    mask = (ended.cumsum(1) - ended.long() == 0).double()
    texts = tokenizer.batch_decode(
        [row[: int(own.sum())].tolist() for row, own in zip(responses, mask, strict=True)],
        skip_special_tokens=True,
    )
    answers = [row["answer"] for row in prompts for _ in range(SAMPLES)]
    correct = [text[-2:] == f"={answer}" for text, answer in zip(texts, answers, strict=True)]
    logps, base_logps = logps.double(), base_logps.double()
    kl = (logps.exp() * (logps - base_logps)).sum(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    columns = (torch.tensor(correct).double(), (kl * mask).sum(1), (entropy * mask).sum(1), mask.sum(1))
    return Samples(*(column.view(-1, SAMPLES) for column in columns))


@torch.no_grad()
def decode_target(models: dict[str, Any], prompts: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sample token by token from `pi_0(v) exp(s(v) / beta) / Z`: responses, log-probs, base's log-probs."""
    names = ("base", "teacher", "unlearned")
    generator = torch.Generator().manual_seed(1)
    caches: dict[str, Any] = dict.fromkeys(names)
    last, responses, targets, bases = prompts, [], [], []
    for _ in range(LONGEST):
        logps = {}
        for name in names:
            output = models[name](input_ids=last, past_key_values=caches[name], use_cache=True)
            caches[name] = output.past_key_values
            logps[name] = output.logits[:, -1].log_softmax(-1)
        signal = (logps["teacher"] - logps["unlearned"]).clamp(-CLIP, CLIP)
        target = (logps["base"] + signal / beta).log_softmax(-1)
        last = torch.multinomial(target.exp(), 1, generator=generator)
        responses.append(last)
        targets.append(target)
        bases.append(logps["base"])
    return torch.cat(responses, dim=1), torch.stack(targets, dim=1), torch.stack(bases, dim=1)


@torch.no_grad()
def sample_policy(model: Any, base: Any, prompts: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sample with `generate`: responses, log-probs, base's log-probs."""
    torch.manual_seed(seed)
    sequences = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=LONGEST,
        pad_token_id=0,
        eos_token_id=EOS,
    )
    first = prompts.shape[1]
    logps = [
        policy(input_ids=sequences, use_cache=False).logits[:, first - 1 : -1].log_softmax(-1)
        for policy in (model, base)
    ]
    return sequences[:, first:], logps[0], logps[1]


@pytest.fixture(scope="module")
def target_samples(
    run_dir: Path, models: dict[str, Any], prompts: list[dict[str, str]], summary: dict[str, Any]
) -> Samples:
    decoded = decode_target(models, encode(run_dir, prompts), summary["beta"])
    return measure(run_dir, prompts, *decoded)


@pytest.fixture(scope="module")
def policy_samples(run_dir: Path, models: dict[str, Any], prompts: list[dict[str, str]]) -> dict[str, Samples]:
    return {
        name: measure(run_dir, prompts, *sample_policy(models[name], models["base"], encode(run_dir, prompts), seed))
        for seed, name in enumerate(("base", "teacher", "student"))
    }


def test_the_student_does_what_its_target_does(target_samples: Samples, policy_samples: dict[str, Samples]) -> None:
    target, student, base = target_samples, policy_samples["student"], policy_samples["base"]
    by_prompt = student.correct.mean(1) - target.correct.mean(1)
    bound = 4 * paired_stderr(by_prompt) + 0.03
    assert abs(float(by_prompt.mean())) < bound
    gain = target.correct.mean(1) - base.correct.mean(1)
    assert float(gain.mean()) > 4 * paired_stderr(gain), "a target like the base policy would show nothing"

    spent, wanted = student.rate(student.kl), target.rate(target.kl)
    stderr = (
        within_stderr(student.kl, student.tokens, SAMPLES) ** 2 + within_stderr(target.kl, target.tokens, SAMPLES) ** 2
    ) ** 0.5
    assert abs(spent - wanted) < 0.15 * wanted + 4 * stderr
    assert stderr < 0.1 * wanted
    # What the target spends on stored states is the budget; on states of its own, about that.
    assert wanted == pytest.approx(BUDGET, rel=0.3)


def test_the_student_is_closer_to_its_target_than_to_anything_else(
    run_dir: Path, models: dict[str, Any], prompts: list[dict[str, str]], summary: dict[str, Any]
) -> None:
    """KL(student || target) on the student's own samples: a small part of what separates the target from the base."""
    ids = encode(run_dir, prompts)[::4]
    responses, logps, base_logps = sample_policy(models["student"], models["base"], ids, seed=7)
    sequences = torch.cat([ids, responses], dim=1)
    mask = ((responses == EOS).cumsum(1) - (responses == EOS).long() == 0).float()
    others = {}
    with torch.no_grad():
        for name in ("teacher", "unlearned"):
            logits = models[name](input_ids=sequences, use_cache=False).logits
            others[name] = logits[:, ids.shape[1] - 1 : -1].log_softmax(-1)
    signal = (others["teacher"] - others["unlearned"]).clamp(-CLIP, CLIP)
    target = (base_logps + signal / summary["beta"]).log_softmax(-1)

    def kl(p: Tensor, q: Tensor) -> float:
        return float(((p.exp() * (p - q)).sum(-1) * mask).sum() / mask.sum())

    assert kl(logps, target) < 0.25 * kl(logps, base_logps)
    assert kl(logps, target) < 0.25 * kl(target, base_logps)


@pytest.mark.parametrize("name", ["base", "teacher", "student"])
def test_the_summary_holds_up(name: str, summary: dict[str, Any], policy_samples: dict[str, Samples]) -> None:
    reported, own = summary["policies"][name], policy_samples[name]
    count = reported["samples_per_prompt"]
    assert (reported["prompts"], count) == (len(own.correct), 8)
    ones = torch.ones_like(own.tokens)
    for key, values, per in (
        ("pass@1", own.correct, ones),
        ("kl_per_token", own.kl, own.tokens),
        ("kl_per_token_to_first", own.kl, own.tokens),
        ("kl_per_response", own.kl, ones),
        ("entropy_per_token", own.entropy, own.tokens),
        ("mean_length", own.tokens, ones),
    ):
        found = float(values.sum() / per.sum())
        stderr = (within_stderr(values, per, SAMPLES) ** 2 + within_stderr(values, per, count) ** 2) ** 0.5
        assert abs(reported[key] - found) < 4 * stderr + 1e-6, key
    assert reported["pass@1_stderr"] == pytest.approx(paired_stderr(own.correct.mean(1)), rel=0.25)
    # Of 16 samples, more prompts have a correct one than of 8.
    assert reported["pass@1"] < reported["pass@k"] < float(own.correct.amax(1).mean()) + 0.1


def test_what_was_spent_of_the_budget(summary: dict[str, Any]) -> None:
    assert summary["budget"] == BUDGET
    assert summary["effective_budget"] == BUDGET
    assert summary["kl_on_stored_states"] == pytest.approx(BUDGET, rel=1e-3)
    assert summary["rollouts"] == summary["rollouts_total"] == 192 * 8
    policies = summary["policies"]
    assert policies["student"]["kl_per_token"] < policies["teacher"]["kl_per_token"] * 1.5
    assert abs(policies["base"]["kl_per_token"]) < 1e-6
