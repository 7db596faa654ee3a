"""Top-k and top-p: which tokens are drawn, how often, and with what log-probs."""

from typing import Any

import numpy as np
import pytest
import torch

from erpd_lightning.data.samplers import TransformersSampler, TruncatedSampler
from erpd_lightning.errors import InvalidArgument
from support.policies import TASK, make_model, token_logps

PROMPTS = [[3, 13, 4], [6, 14, 7, 15, 8, 13, 9]]
TEMPERATURE = 3.0


def truncated(model: Any, prompt: list[int], response: list[int], top_p: float, top_k: int) -> np.ndarray:
    """Probabilities at each token, `(T, V)`: the k likeliest, then the fewest of them that hold top_p of their sum."""
    rows = token_logps(model, prompt, response, TEMPERATURE).detach().double().exp().numpy()
    for row in rows:
        order = np.argsort(-row)
        row[order[top_k or len(row) :]] = 0
        row /= row.sum()
        before = np.cumsum(row[order]) - row[order]
        row[order[before >= top_p]] = 0
        row /= row.sum()
    return rows


@pytest.mark.parametrize(("top_p", "top_k"), [(0.8, 0), (1.0, 3), (0.7, 6), (1e-9, 0)])
def test_draws_are_of_the_likeliest_tokens(top_p: float, top_k: int) -> None:
    model, draws = make_model(), 1500
    sampler = TruncatedSampler(1, TEMPERATURE, 1000, top_p, top_k)
    responses = sampler.sample(model, TASK.tokenizer(), [prompt for prompt in PROMPTS for _ in range(draws)], seed=1)
    for number, prompt in enumerate(PROMPTS):
        own = responses[number * draws :][:draws]
        expected = truncated(model, prompt, [0], top_p, top_k)[0]
        assert 0 < (expected > 0).sum() < len(expected) - 3
        counts = np.bincount([response.ids[0] for response in own], minlength=len(expected))
        assert (counts[expected == 0] == 0).all()
        errors = np.sqrt(expected * (1 - expected) / draws)
        assert (np.abs(counts / draws - expected) <= 4.5 * errors).all()


def test_log_probs_are_those_of_what_was_drawn_from() -> None:
    model = make_model()
    sampler = TruncatedSampler(8, TEMPERATURE, 5, top_p=0.8, top_k=7)
    prompts = PROMPTS * 4
    for prompt, response in zip(prompts, sampler.sample(model, TASK.tokenizer(), prompts, seed=1), strict=True):
        expected = truncated(model, prompt, response.ids, 0.8, 7)[range(len(response.ids)), response.ids]
        assert response.logps == pytest.approx(np.log(expected).tolist(), abs=1e-5)


def test_greedy_decoding_and_no_truncation() -> None:
    model, tokenizer = make_model(), TASK.tokenizer()
    (first, second) = TruncatedSampler(8, top_k=1).sample(model, tokenizer, [PROMPTS[0]] * 2, seed=1)
    assert first == second
    assert first.logps == [0.0] * len(first.ids)
    best = token_logps(model, PROMPTS[0], first.ids).argmax(-1)
    assert first.ids == best.tolist()
    plain = TransformersSampler(8).sample(model, tokenizer, PROMPTS, seed=1)
    assert TruncatedSampler(8).sample(model, tokenizer, PROMPTS, seed=1) == plain
    assert torch.isfinite(torch.tensor(plain[0].logps)).all()


@pytest.mark.parametrize("given", [{"top_p": 0.0}, {"top_p": 1.1}, {"top_p": float("nan")}, {"top_k": -1}])
def test_values_out_of_range(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=rf"^{next(iter(given))} is "):
        TruncatedSampler(**given)
