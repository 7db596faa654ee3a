"""Metrics of an evaluation, from its samples and the folders of the policies alone."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samplers import Response
from erpd_lightning.errors import UserError
from erpd_lightning.modules.evaluation import EvaluationModule
from erpd_lightning.modules.extreme_region import ExtremeRegionModule
from erpd_lightning.seeds import derive_seed
from support.modules import PROMPTS, SAMPLES, Recorder, Validations, make_trainer
from support.policies import VOCABULARY_SIZE, make_model, save_policy, token_logps
from support.verifiers import EvenEnd


def ratio(x: Any, y: Any) -> tuple[float, float]:
    """A ratio of sums over prompts, and the standard error of its linearised residuals."""
    x, y = np.array(x, dtype=float), np.array(y, dtype=float)
    value = x.sum() / y.sum()
    residuals = x - value * y
    return float(value), float(np.std(residuals, ddof=1) * len(x) ** 0.5 / y.sum())


def measured(
    drawn: list[tuple[list[int], Response]], policies: dict[str, str], references: dict[str, str]
) -> dict[str, float]:
    """All metrics from the samples and the folders of the policies, with transformers alone."""
    models = {name: AutoModelForCausalLM.from_pretrained(path) for name, path in references.items()}
    model = AutoModelForCausalLM.from_pretrained(policies["student"])
    count = len(PROMPTS)
    sums: dict[str, list[float]] = {
        name: [0.0] * count for name in ("tokens", "correct", "nine", "entropy", "cut", *references)
    }
    texts: list[set[tuple[int, ...]]] = [set() for _ in PROMPTS]
    for number, (prompt, response) in enumerate(drawn):
        group = number // SAMPLES
        logp = token_logps(model, prompt, response.ids).detach().double()
        sums["tokens"][group] += len(response.ids)
        sums["entropy"][group] -= float((logp.exp() * logp).sum())
        sums["cut"][group] += response.ids[-1] != 2
        text = [token for token in response.ids if token > 2]
        texts[group].add(tuple(text))
        sums["correct"][group] += bool(text) and text[-1] in range(3, 13) and (text[-1] - 3) % 2 == 0
        sums["nine"][group] += bool(text) and text[-1] == 12  # which the verifier leaves undecided
        for name, other in models.items():
            logq = token_logps(other, prompt, response.ids).detach().double()
            sums[name][group] += float((logp.exp() * (logp - logq)).sum())
    samples = [SAMPLES] * count
    result = {}
    result["pass@1"], result["pass@1_stderr"] = ratio(sums["correct"], samples)
    result["pass@k"], result["pass@k_stderr"] = ratio([correct > 0 for correct in sums["correct"]], [1] * count)
    result["entropy_per_token"] = ratio(sums["entropy"], sums["tokens"])[0]
    result["mean_length"] = ratio(sums["tokens"], samples)[0]
    result["truncated"] = ratio(sums["cut"], samples)[0]
    result["distinct"] = sum(len(different) for different in texts) / len(drawn)
    result["mean_reward"] = sum(sums["correct"]) / (len(drawn) - sum(sums["nine"]))
    result["unchecked"] = sum(sums["nine"]) / len(drawn)
    for name in references:
        suffix = "" if name == "base" else f"_to_{name}"
        value, stderr = ratio(sums[name], sums["tokens"])
        result[f"kl_per_token{suffix}"], result[f"kl_per_token{suffix}_stderr"] = value, stderr
        value, stderr = ratio(sums[name], samples)
        result[f"kl_per_response{suffix}"], result[f"kl_per_response{suffix}_stderr"] = value, stderr
    return result


def test_metrics_of_a_policy(evaluation_data: Callable[..., RolloutDataModule], policies: dict[str, str]) -> None:
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
    evaluation_data: Callable[..., RolloutDataModule], policies: dict[str, str], tmp_path: Path
) -> None:
    other = make_model()
    other.resize_token_embeddings(VOCABULARY_SIZE + 5)
    references = {"base": str(save_policy(tmp_path / "other", other))}
    with pytest.raises(UserError, match=r"references.base .* has a vocabulary of 24 tokens, the policy one of 19"):
        make_trainer().test(EvaluationModule(policies["student"], references=references), datamodule=evaluation_data())


def test_pass_at_k_of_fewer_than_all_samples(
    evaluation_data: Callable[..., RolloutDataModule], policies: dict[str, str]
) -> None:
    data = evaluation_data()
    module = EvaluationModule(policies["student"], pass_at_k=2)
    trainer = make_trainer()
    trainer.test(module, datamodule=data, verbose=False)
    drawn = data.sampler.drawn  # type: ignore[attr-defined]
    tokenizer, shares = data.tokenizer, []
    for group in range(len(PROMPTS)):
        own = [response.ids for _, response in drawn[group * SAMPLES :][:SAMPLES]]
        rewards = EvenEnd()(tokenizer.batch_decode(own, skip_special_tokens=True), ["?"] * SAMPLES)
        pairs = list(combinations([bool(reward) for reward in rewards], 2))
        shares.append(sum(any(pair) for pair in pairs) / len(pairs))
    assert 0 < np.mean(shares) < 1
    assert float(trainer.callback_metrics["test/pass@k"]) == pytest.approx(float(np.mean(shares)))
    with pytest.raises(UserError, match="pass_at_k is 5, but only 4"):
        make_trainer().test(EvaluationModule(policies["student"], pass_at_k=5), datamodule=data)


def test_a_policy_is_at_no_distance_from_itself(
    evaluation_data: Callable[..., RolloutDataModule], policies: dict[str, str]
) -> None:
    trainer = make_trainer()
    trainer.test(EvaluationModule(policies["student"]), datamodule=evaluation_data(), verbose=False)
    assert abs(float(trainer.callback_metrics["test/kl_per_token"])) < 1e-6


def test_each_validation_draws_afresh(
    scored: Path, evaluation_data: Callable[..., RolloutDataModule], policies: dict[str, str]
) -> None:
    seen = Validations()
    data = evaluation_data(scored, batch_size=8)
    module = ExtremeRegionModule(policies["student"], learning_rate=0.01, warmup_steps=0)
    make_trainer(seen, max_epochs=3).fit(module, datamodule=data)
    # Two steps an epoch.
    expected = [derive_seed(derive_seed(0, "validation", i), step) for step in (2, 4, 6) for i in range(3)]
    assert data.sampler.seeds == expected  # type: ignore[attr-defined]
    kls = [found["val/kl_per_token"] for found in seen.found]
    assert 0 < kls[0] < kls[1] < kls[2]
    assert "val/pass@1_stderr" in seen.found[0]


class LastCharacter(EvenEnd):
    """Takes the last character for the answer; what ends with a 4 gives none."""

    def final_answers(self, responses: Sequence[str]) -> list[str | None]:
        return [None if response[-1:] in ("4", "") else response[-1] for response in responses]


def test_majority_votes_where_the_verifier_finds_answers(
    evaluation_data: Callable[..., RolloutDataModule], policies: dict[str, str]
) -> None:
    data = evaluation_data(verifier=LastCharacter(), validation_samples=8)
    trainer = make_trainer()
    trainer.test(EvaluationModule(policies["student"]), datamodule=data, verbose=False)
    values = []
    for group in range(len(PROMPTS)):
        drawn = data.sampler.drawn[group * 8 :][:8]  # type: ignore[attr-defined]
        texts = data.tokenizer.batch_decode([response.ids for _, response in drawn], skip_special_tokens=True)
        votes = Counter(answer for answer in LastCharacter().final_answers(texts) if answer)
        winners = [answer for answer, count in votes.items() if count == max(votes.values())]
        values.append(np.mean([EvenEnd.check(answer) == 1 for answer in winners]) if winners else 0)
    logged = [float(trainer.callback_metrics[f"test/majority@k{suffix}"]) for suffix in ("", "_stderr")]
    assert 0 < logged[0] < 1
    assert logged == pytest.approx(ratio(values, [1] * len(values)))
    trainer.validate(EvaluationModule(policies["student"]), datamodule=data, verbose=False)
    assert "val/majority@k" not in trainer.callback_metrics
