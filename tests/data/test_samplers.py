"""Samples against the policy's own probabilities: their log-probs, their frequencies, their ends."""

import random
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import GenerationConfig

from erpd_lightning.data.samplers import Response, TransformersSampler
from erpd_lightning.errors import UserError
from support.policies import SMALL, TASK, VOCABULARY_SIZE, build, make_model, sharpen, token_logps

EOS = 2
# Of unequal length: sampled together, the shorter ones are padded on the left.
PROMPTS = [[3, 13, 4], [5], [6, 14, 7, 15, 8, 13, 9], [4, 13, 10, 18]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return TASK.tokenizer()


@pytest.fixture
def model() -> Any:
    return make_model()


def check_logps(model: Any, prompts: list[list[int]], responses: list[Response], temperature: float) -> None:
    for prompt, response in zip(prompts, responses, strict=True):
        logps = token_logps(model, prompt, response.ids, temperature)
        expected = logps.gather(1, torch.tensor(response.ids)[:, None])[:, 0]
        assert response.logps == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("batch_size", [3, 256])
def test_logps_are_those_of_teacher_forcing(model: Any, tokenizer: Any, temperature: float, batch_size: int) -> None:
    sampler = TransformersSampler(12, temperature, batch_size)
    prompts = PROMPTS * 5
    responses = sampler.sample(model, tokenizer, prompts, seed=1)
    check_logps(model, prompts, responses, temperature)
    assert len({tuple(response.ids) for response in responses}) > 10


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen3_moe"])
def test_logps_of_other_architectures(tokenizer: Any, name: str) -> None:
    model, prompts = build(name), PROMPTS * 3
    check_logps(model, prompts, TransformersSampler(12).sample(model, tokenizer, prompts, seed=1), 1.0)


def test_states_of_linear_attention_leave_with_their_rows(tokenizer: Any) -> None:
    torch.manual_seed(0)
    kinds: dict[str, Any] = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "norm_eps": 1e-6}
    model = sharpen(transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**SMALL, **kinds)), 6.0)
    prompts = PROMPTS * 10
    responses = TransformersSampler(12).sample(model, tokenizer, prompts, seed=1)
    assert len({len(response.ids) for response in responses}) > 3
    check_logps(model, prompts, responses, 1.0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_frequencies_are_the_probabilities(model: Any, tokenizer: Any, temperature: float) -> None:
    draws = 3000
    prompts = [PROMPTS[0], PROMPTS[2]] * draws
    sampler = TransformersSampler(1, temperature, batch_size=1000)
    responses = sampler.sample(model, tokenizer, prompts, seed=2)
    for first in range(2):
        logps = token_logps(model, prompts[first], [EOS], temperature)[0].detach()
        expected = draws * logps.exp().double().numpy()
        tokens = [response.ids[0] for response in responses[first::2]]
        counts = np.bincount(tokens, minlength=VOCABULARY_SIZE)
        # A chi-square statistic has mean k and variance 2k; rare tokens count as one.
        rare = expected <= max(5, expected.min())
        observed = np.append(counts[~rare], counts[rare].sum())
        wanted = np.append(expected[~rare], expected[rare].sum())
        assert np.max(expected) < 0.9 * draws
        degrees = len(wanted) - 1
        statistic = float(((observed - wanted) ** 2 / wanted).sum())
        assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_what_a_checkpoint_ships_does_not_count(model: Any, tokenizer: Any) -> None:
    sampler = TransformersSampler(10)
    plain = sampler.sample(model, tokenizer, PROMPTS, seed=3)
    shipped = GenerationConfig(
        do_sample=False,
        top_k=2,
        top_p=0.3,
        min_p=0.2,
        temperature=0.1,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        max_length=3,
        min_new_tokens=9,
        suppress_tokens=[5],
        eos_token_id=EOS,
    )
    model.generation_config = shipped
    assert sampler.sample(model, tokenizer, PROMPTS, seed=3) == plain
    assert model.generation_config is shipped


def test_the_mode_is_back_after_an_error(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.train()

    def fail(**_: Any) -> None:
        assert not model.training
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        TransformersSampler(4).sample(model, tokenizer, PROMPTS, seed=0)
    assert model.training


def test_what_is_drawn_beside_a_response_does_not_change_it(model: Any, tokenizer: Any) -> None:
    prompts = PROMPTS * 10
    alone = TransformersSampler(12, batch_size=1).sample(model, tokenizer, prompts, seed=1)
    for settings in ({}, {"batch_size": 7}, {"max_cache_tokens": 60}):
        together = TransformersSampler(12, **settings).sample(model, tokenizer, prompts, seed=1)
        assert [response.ids for response in together] == [response.ids for response in alone]


def test_responses_that_have_ended_cost_nothing(model: Any, tokenizer: Any) -> None:
    rows: list[int] = []
    model.generation_config.eos_token_id = [EOS, 7, 9, 11]
    model.register_forward_pre_hook(lambda _, __, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    responses = TransformersSampler(40).sample(model, tokenizer, PROMPTS * 20, seed=1)
    lengths = [len(response.ids) for response in responses]
    assert len(rows) == max(lengths)
    alive = [sum(length > step for length in lengths) for step in range(len(rows))]
    # The first half of the batch ends early; a third more rows than are left is the most that is run.
    assert alive[len(rows) // 2] < len(lengths) / 2
    assert all(run <= max(number / 0.75 + 1, 1) for run, number in zip(rows, alive, strict=True))


def test_prompts_are_run_with_those_of_similar_length_within_memory(model: Any, tokenizer: Any) -> None:
    shapes = []
    model.register_forward_pre_hook(lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    TransformersSampler(1, max_cache_tokens=8).sample(model, tokenizer, PROMPTS, seed=1)
    assert [tuple(shape) for shape in shapes] == [(1, 7), (1, 4), (2, 3)]
    shapes.clear()
    TransformersSampler(1, max_cache_tokens=3).sample(model, tokenizer, PROMPTS, seed=1)
    assert [tuple(shape) for shape in shapes] == [(1, 7), (1, 4), (1, 3), (1, 1)]


def test_how_much_memory_is_taken_is_no_setting_of_responses() -> None:
    assert TransformersSampler(5, max_cache_tokens=9).settings() == TransformersSampler(5).settings()
    assert TransformersSampler(5).settings() == {"max_new_tokens": 5, "temperature": 1.0, "batch_size": 256}


def test_logps_that_are_not_finite(model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[13] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        TransformersSampler(3).sample(model, tokenizer, PROMPTS, seed=0)


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_a_response_ends_with_its_first_end_token(model: Any, pad: str) -> None:
    tokenizer = TASK.tokenizer()
    tokenizer.pad_token = pad
    model.generation_config.eos_token_id = [EOS, 7]
    responses = TransformersSampler(4).sample(model, tokenizer, PROMPTS * 50, seed=4)
    check_logps(model, PROMPTS * 50, responses, 1.0)
    for response in responses:
        assert len(response.ids) == len(response.logps)
        assert not {EOS, 7} & set(response.ids[:-1])
        ended = response.ids[-1] in (EOS, 7)
        assert response.finish_reason == ("stop" if ended else "length")
        assert ended or len(response.ids) == 4
    ends = [response.ids[-1] for response in responses]
    lengths = [len(response.ids) for response in responses]
    assert {EOS, 7} <= set(ends)
    assert len(set(ends)) > 2
    assert min(lengths) == 1
    assert any(n == 4 and r.finish_reason == "stop" for n, r in zip(lengths, responses, strict=True))


def test_a_seed_fixes_the_samples(model: Any, tokenizer: Any) -> None:
    sampler = TransformersSampler(8)
    first = sampler.sample(model, tokenizer, PROMPTS, seed=5)
    torch.rand(3)
    assert sampler.sample(model, tokenizer, PROMPTS, seed=5) == first
    assert sampler.sample(model, tokenizer, PROMPTS, seed=6) != first
    assert sampler.sample(model, tokenizer, PROMPTS, seed=2**63 - 1) != first


def test_random_state_and_mode_stay(model: Any, tokenizer: Any) -> None:
    model.train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    TransformersSampler(8).sample(model, tokenizer, PROMPTS, seed=5)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # type: ignore[index]
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_cache_tokens": 0}, "max_cache_tokens"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        TransformersSampler(**settings)
