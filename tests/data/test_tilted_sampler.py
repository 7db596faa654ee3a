"""Decoding from the target against the target worked out by brute force: each prefix by itself, without padding."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from erpd_lightning.data.samplers import TransformersSampler
from erpd_lightning.data.samplers.tilted import TiltedResponse, TiltedSampler
from erpd_lightning.objectives.signal import Signal, Term
from support.policies import ARCHITECTURES, TASK, VOCABULARY_SIZE, build, make_model, token_logps

EOS = 2
# Of unequal length: sampled together, the shorter ones are padded on the left.
PROMPTS = [[3, 13, 4], [5], [6, 14, 7, 15, 8, 13, 9], [4, 13, 10, 18]]
UNCLIPPED = 1e6

TEACHER_TO_UNLEARNED = Signal([Term("teacher", "unlearned", 1.0, 2.0)])
TWO_TERMS = Signal([Term("teacher", "base", 0.7, 1.5), Term("base", "unlearned", 0.4, 2.5)])
TEACHER_ITSELF = Signal([Term("teacher", "base", 1.0, UNCLIPPED)])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return TASK.tokenizer()


@pytest.fixture
def models() -> dict[str, Any]:
    return {name: make_model(seed) for seed, name in enumerate(("base", "teacher", "unlearned"))}


def others(name: str) -> dict[str, Any]:
    """Three policies of an architecture whose weights differ a little."""
    made = {}
    for number, policy in enumerate(("base", "teacher", "unlearned")):
        made[policy] = build(name)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in made[policy].parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return made


def reference(
    models: dict[str, Any],
    signal: Signal,
    beta: float,
    prompt: list[int],
    response: list[int],
    temperature: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities `(T, V)` of the target and of the base policy along a response, in float64."""
    with torch.no_grad():
        logps = {
            name: token_logps(model, prompt, response, temperature).double().numpy() for name, model in models.items()
        }
    tilted = logps["base"].copy()
    for term in signal.terms:
        ratio = logps[term.numerator] - logps[term.denominator]
        tilted += term.weight * np.minimum(np.maximum(ratio, -term.clip), term.clip) / beta
    weights = np.exp(tilted - tilted.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True), np.exp(logps["base"])


def check(
    models: dict[str, Any], signal: Signal, beta: float, drawn: list[TiltedResponse], temperature: float = 1.0
) -> None:
    """Log-probs, KL and entropy of every token of every response."""
    repeated = PROMPTS * (len(drawn) // len(PROMPTS))
    for prompt, (response, kls, entropies) in zip(repeated, drawn, strict=True):
        target, base = reference(models, signal, beta, prompt, response.ids, temperature)
        own = target[np.arange(len(response.ids)), response.ids]
        assert response.logps == pytest.approx(np.log(own), abs=3e-5)
        assert kls == pytest.approx((target * np.log(target / base)).sum(axis=1), abs=3e-5)
        assert entropies == pytest.approx(-(target * np.log(target)).sum(axis=1), abs=3e-5)


@pytest.mark.parametrize("signal", [TEACHER_TO_UNLEARNED, TWO_TERMS])
@pytest.mark.parametrize(("temperature", "batch_size"), [(1.0, 256), (0.7, 3)])
def test_every_token_is_drawn_from_the_target(
    models: dict[str, Any], tokenizer: Any, signal: Signal, temperature: float, batch_size: int
) -> None:
    sampler = TiltedSampler(TransformersSampler(12, temperature, batch_size), signal, 1.3)
    drawn = sampler.sample(models, tokenizer, PROMPTS * 20, seed=1)
    check(models, signal, 1.3, drawn, temperature)
    responses = [row.response for row in drawn]
    assert len({tuple(response.ids) for response in responses}) > 12
    assert {response.finish_reason for response in responses} == {"stop", "length"}
    for response, kls, entropies in drawn:
        assert response.ids.count(EOS) == (response.finish_reason == "stop")
        assert len(response.ids) == len(response.logps) == len(kls) == len(entropies) <= 12


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_any_architecture(tokenizer: Any, name: str) -> None:
    models = others(name)
    sampler = TiltedSampler(TransformersSampler(8), TEACHER_TO_UNLEARNED, 0.8)
    drawn = sampler.sample(models, tokenizer, PROMPTS * 2, seed=1)
    check(models, TEACHER_TO_UNLEARNED, 0.8, drawn)
    assert sum(sum(row.kl) for row in drawn) > 0.1


def test_every_token_is_read_once(models: dict[str, Any], tokenizer: Any) -> None:
    lengths = []
    models["teacher"].register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    TiltedSampler(TransformersSampler(5), TEACHER_TO_UNLEARNED, 1.0).sample(models, tokenizer, PROMPTS * 4, seed=1)
    assert lengths == [7, 1, 1, 1, 1]


def test_a_policy_without_a_cache_reads_everything_again(models: dict[str, Any], tokenizer: Any) -> None:
    forward = models["teacher"].forward

    def without_cache(input_ids: Any, attention_mask: Any, position_ids: Any, **_: Any) -> Any:
        return forward(input_ids, attention_mask, position_ids, use_cache=False)

    models["teacher"].forward = without_cache
    drawn = TiltedSampler(TransformersSampler(6), TEACHER_TO_UNLEARNED, 1.0).sample(models, tokenizer, PROMPTS, seed=1)
    models["teacher"].forward = forward
    check(models, TEACHER_TO_UNLEARNED, 1.0, drawn)


def test_frequencies_are_the_targets_probabilities(models: dict[str, Any], tokenizer: Any) -> None:
    draws = 3000
    sampler = TiltedSampler(TransformersSampler(1, batch_size=1000), TWO_TERMS, 0.9)
    drawn = sampler.sample(models, tokenizer, [PROMPTS[0], PROMPTS[2]] * draws, seed=2)
    for first, prompt in enumerate((PROMPTS[0], PROMPTS[2])):
        expected = draws * reference(models, TWO_TERMS, 0.9, prompt, [EOS])[0][0]
        tokens = [row.response.ids[0] for row in drawn[first::2]]
        counts = np.bincount(tokens, minlength=VOCABULARY_SIZE)
        # A chi-square statistic has mean k and variance 2k; rare tokens count as one.
        rare = expected <= max(5, expected.min())
        observed = np.append(counts[~rare], counts[rare].sum())
        wanted = np.append(expected[~rare], expected[rare].sum())
        degrees = len(wanted) - 1
        assert degrees > 2
        statistic = float(((observed - wanted) ** 2 / wanted).sum())
        assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_a_beta_without_end_is_the_base_policy(models: dict[str, Any], tokenizer: Any) -> None:
    plain = TransformersSampler(10)
    drawn = TiltedSampler(plain, TEACHER_TO_UNLEARNED, 1e9).sample(models, tokenizer, PROMPTS * 3, seed=5)
    expected = plain.sample(models["base"], tokenizer, PROMPTS * 3, seed=5)
    assert [row.response.ids for row in drawn] == [response.ids for response in expected]
    for row, response in zip(drawn, expected, strict=True):
        assert row.response.logps == pytest.approx(response.logps, abs=1e-5)
        assert max(row.kl) < 1e-6


def test_one_unclipped_ratio_to_the_base_policy_is_the_teacher(models: dict[str, Any], tokenizer: Any) -> None:
    plain = TransformersSampler(10)
    drawn = TiltedSampler(plain, TEACHER_ITSELF, 1.0).sample(models, tokenizer, PROMPTS * 3, seed=5)
    expected = plain.sample(models["teacher"], tokenizer, PROMPTS * 3, seed=5)
    assert [row.response.ids for row in drawn] == [response.ids for response in expected]
    for row, response in zip(drawn, expected, strict=True):
        assert row.response.logps == pytest.approx(response.logps, abs=1e-4)


def test_the_same_seed_draws_the_same(models: dict[str, Any], tokenizer: Any) -> None:
    sampler = TiltedSampler(TransformersSampler(10, batch_size=3), TWO_TERMS, 1.0)
    state = torch.get_rng_state()
    first, again, other = (sampler.sample(models, tokenizer, PROMPTS, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), state)


def test_policies_are_left_as_they_were(models: dict[str, Any], tokenizer: Any) -> None:
    """Dropout is off while they read; a checkpoint's own way of sampling neither counts nor is lost."""
    noisy = {name: build("gpt2", dropout=0.5) for name in models}
    shipped = GenerationConfig(do_sample=True, top_k=1, temperature=0.2, eos_token_id=EOS)
    for number, (name, model) in enumerate(noisy.items()):
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        model.generation_config = shipped
        model.train(name != "unlearned")
    drawn = TiltedSampler(TransformersSampler(6), TWO_TERMS, 1.0).sample(noisy, tokenizer, PROMPTS, seed=1)
    assert [model.training for model in noisy.values()] == [True, True, False]
    assert all(model.generation_config is shipped for model in noisy.values())
    check({name: model.eval() for name, model in noisy.items()}, TWO_TERMS, 1.0, drawn)


def test_entries_that_policies_rule_out_stay_ruled_out(models: dict[str, Any], tokenizer: Any) -> None:
    for model in models.values():
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.tensor([7, 8]), -torch.inf))
    drawn = TiltedSampler(TransformersSampler(8), TEACHER_TO_UNLEARNED, 0.5).sample(
        models, tokenizer, PROMPTS * 4, seed=1
    )
    assert not {7, 8} & {token for row in drawn for token in row.response.ids}
    assert all(np.isfinite([*row.response.logps, *row.kl, *row.entropy]).all() for row in drawn)
