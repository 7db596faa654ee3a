"""Each metric against a reference in plain loops, by hand, over splits into batches, and over two processes.

Run as a program (`python test_metrics.py RANK RENDEZVOUS`) this is one of the two processes.
"""

import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric

from erpd_lightning.metrics import (
    ClusteredRatio,
    DistinctShare,
    EffectiveSampleSize,
    MajorityVote,
    MeanEntropy,
    MeanKL,
    MeanLength,
    PassAtK,
    Ratio,
    RatioTail,
    TruncatedShare,
    clustered_ratio,
    distinct_responses,
    distinct_share,
    effective_sample_size,
    majority_vote,
    mean_entropy,
    mean_kl,
    mean_length,
    pass_at_k,
    ratio_tail,
    truncated_share,
)
from support import reference

Floats = NDArray[np.float64]


def draw_clusters(seed: int, shape: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Numbers of tokens, and sums over them that vary much more between clusters than within."""
    rng = np.random.default_rng(seed)
    y = rng.integers(5, 60, shape).astype(np.float64)
    x = y * rng.gamma(2.0, 0.02, shape) + 0.01 * rng.standard_normal(shape)
    return x, y


# pass@k


@pytest.mark.parametrize(
    ("correct", "samples", "k", "expected"),
    [(1, 2, 1, 1 / 2), (1, 4, 2, 1 / 2), (2, 4, 2, 5 / 6), (0, 4, 4, 0.0), (3, 4, 2, 1.0)],
)
def test_pass_at_k_by_hand(correct: int, samples: int, k: int, expected: float) -> None:
    result = pass_at_k(torch.tensor([correct]), torch.tensor([samples]), k)
    assert result.dtype == torch.float64
    assert result.tolist() == pytest.approx([expected], abs=1e-15)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(k: int) -> None:
    cases = [(c, n) for n in range(k, 9) for c in range(n + 1)]
    correct, samples = torch.tensor(cases).unbind(1)
    expected = [reference.share_of_subsets_with_a_right_one(c, n, k) for c, n in cases]
    assert pass_at_k(correct, samples, k).tolist() == pytest.approx(expected, abs=1e-14)


def test_pass_at_k_of_many_samples_does_not_overflow() -> None:
    correct, samples = torch.tensor([1, 5000]), torch.tensor([10_000, 10_000])
    first, second = pass_at_k(correct, samples, 1000).tolist()
    assert first == pytest.approx(0.1, rel=1e-12)
    assert second == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("correct", "samples", "k", "message"),
    [
        ([1], [2], 3, "pass@3 needs 3 samples of each prompt, one has 2"),
        ([1], [2], 0, "k of at least 1"),
        ([3], [2], 1, "between 0 and all samples"),
        ([-1], [2], 1, "between 0 and all samples"),
        ([1, 1], [2], 1, "one entry per prompt"),
    ],
)
def test_pass_at_k_refuses(correct: list[int], samples: list[int], k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(torch.tensor(correct), torch.tensor(samples), k)


def test_pass_at_k_metric_refuses_k_when_built() -> None:
    with pytest.raises(ValueError, match="k of at least 1"):
        PassAtK(0)


# ratios


def test_ratio_by_hand() -> None:
    # r = 4/4; residuals -1 and 1; sqrt(2/1 * 2) / 4
    ratio = clustered_ratio(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
    assert ratio.value.item() == 1.0
    assert ratio.stderr.item() == 0.5


@pytest.mark.parametrize("clusters", [2, 3, 50])
def test_ratio_matches_the_reference(clusters: int) -> None:
    x, y = draw_clusters(clusters, (clusters,))
    ratio = clustered_ratio(torch.from_numpy(x), torch.from_numpy(y))
    assert [ratio.value.item(), ratio.stderr.item()] == pytest.approx(reference.ratio_by_prompts(list(x), list(y)))


def test_ratio_with_equal_denominators_is_a_mean() -> None:
    x, _ = draw_clusters(0, (20,))
    ratio = clustered_ratio(torch.from_numpy(x), torch.ones(20))
    assert ratio.value.item() == pytest.approx(x.mean())
    assert ratio.stderr.item() == pytest.approx(x.std(ddof=1) / np.sqrt(20))


def test_ratio_counts_clusters_not_what_is_in_them() -> None:
    x, y = draw_clusters(1, (30,))
    once = clustered_ratio(torch.from_numpy(x), torch.from_numpy(y))
    larger = clustered_ratio(torch.from_numpy(4 * x), torch.from_numpy(4 * y))
    assert torch.allclose(torch.stack(once), torch.stack(larger), rtol=1e-12)


def test_stderr_is_the_spread_over_repeated_experiments() -> None:
    x, y = draw_clusters(2, (20_000, 200))
    spread = (x.sum(1) / y.sum(1)).std()
    experiments = torch.from_numpy(np.stack([x[:500], y[:500]], axis=1))
    stderrs = [clustered_ratio(*experiment).stderr for experiment in experiments]
    # The spread of 20,000 experiments is known to 0.5 %, the mean of 500 estimates to 0.3 %.
    assert torch.stack(stderrs).mean().item() == pytest.approx(spread, rel=0.02)


def test_ratio_of_nothing_is_unknown() -> None:
    none = clustered_ratio(torch.empty(0), torch.empty(0))
    assert none.value.isnan()
    assert none.stderr.isnan()
    one = clustered_ratio(torch.tensor([1.0]), torch.tensor([2.0]))
    assert one.value.item() == 0.5
    assert one.stderr.isnan()
    unmeasured = clustered_ratio(torch.tensor([1.0, 0.0]), torch.zeros(2))
    assert unmeasured.value.isnan()
    assert unmeasured.stderr.isnan()


@pytest.mark.parametrize("factor", [0.1, 0.3, 0.7, 1 / 3])
def test_ratio_without_spread_has_no_error(factor: float) -> None:
    y = torch.tensor([1.0, 3.0, 7.0], dtype=torch.float64)
    ratio = clustered_ratio(factor * y, y)
    assert ratio.value.item() == pytest.approx(factor)
    assert ratio.stderr.item() == pytest.approx(0.0, abs=1e-8)


def test_ratio_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"shapes \(2, 1\) and \(2, 1\)"):
        clustered_ratio(torch.ones(2, 1), torch.ones(2, 1))
    with pytest.raises(ValueError, match="one entry per prompt"):
        ClusteredRatio().update(torch.ones(2), torch.ones(3))


# the majority's vote


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        ([7, 3, 7, 2], 7, 1.0),
        ([7, 3, 7, 2], 3, 0.0),
        ([7, 3, 7, 2], 9, 0.0),
        ([7, 3, 3, 7], 3, 1 / 2),
        ([1, 2, 0, 5], 0, 1 / 4),
        ([-1, -1, -1, 4], 4, 1.0),
        ([-1, -1, 4, 5], 4, 1 / 2),
        ([-1, -1, -1, -1], 0, 0.0),
    ],
)
def test_majority_by_hand(answers: list[int], right: int, expected: float) -> None:
    vote = majority_vote(torch.tensor([answers]), torch.tensor([right]))
    assert vote.dtype == torch.float64
    assert vote.tolist() == [expected]


def test_majority_matches_the_reference() -> None:
    rng = np.random.default_rng(0)
    answers, right = rng.integers(-1, 4, (200, 6)), rng.integers(0, 4, 200)
    expected = [reference.majority(row, answer) for row, answer in zip(answers, right, strict=True)]
    assert len(set(expected)) > 3
    assert majority_vote(torch.from_numpy(answers), torch.from_numpy(right)).tolist() == expected


def test_majority_without_responses() -> None:
    assert majority_vote(torch.zeros(0, 4).long(), torch.zeros(0).long()).tolist() == []
    assert majority_vote(torch.zeros(2, 0).long(), torch.zeros(2).long()).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("answers", "right", "message"),
    [
        ([[1, 2]], [-1], "the right one is 0 or more"),
        ([[1, -2]], [1], "number from 0"),
        ([[1, 2]], [1, 2], r"got \(1, 2\) and \(2,\)"),
        ([1, 2], [1, 2], r"answers of shape \(P, n\)"),
    ],
)
def test_majority_refuses(answers: Any, right: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        majority_vote(torch.tensor(answers), torch.tensor(right))


# distinct responses


def test_distinct_responses_by_hand() -> None:
    responses = ["1", "2", "1", "1", "1", "2"]
    prompts = torch.tensor([7, 7, 7, 3, 3, 9])
    assert distinct_responses(responses, prompts).tolist() == [1.0, 2.0, 1.0]  # prompts 3, 7 and 9
    assert distinct_share(responses, prompts).value.item() == 4 / 6
    as_tokens = [tuple(response) for response in responses]
    assert distinct_responses(as_tokens, prompts).tolist() == [1.0, 2.0, 1.0]
    assert distinct_responses([], torch.zeros(0).long()).tolist() == []
    with pytest.raises(ValueError, match=r"6 responses have 6 prompts, got shape \(5,\)"):
        distinct_share(responses, prompts[:5])


# tokens


def test_kl_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.5]).log(), torch.tensor([0.25, 0.5, 0.25]).log()
    # Two responses to one prompt, of two tokens and of one: log-ratios log 2, -log 2 and log 2.
    logp, logq = p.view(1, 3).repeat(2, 1), q.view(1, 3).repeat(2, 1)
    mask = torch.tensor([[True, True, False], [False, False, True]])
    prompts = torch.tensor([4, 4])
    log2 = math.log(2)
    for estimator, total in (("k1", log2), ("k2", 1.5 * log2**2), ("k3", -0.5 + 1 - 0.5 + log2)):
        for per, count in (("token", 3), ("response", 2)):
            found = mean_kl(logp, logq, mask, prompts, estimator=estimator, per=per)  # type: ignore[arg-type]
            assert found.value.item() == pytest.approx(total / count, rel=1e-6), (estimator, per)
            assert found.stderr.isnan()
    sampler = (logp.exp() / torch.tensor([0.5, 2.0, 4.0])).log()  # weights 0.5, 2 and 4
    found = mean_kl(logp, logq, mask, prompts, estimator="k1", log_sampler=sampler)
    assert found.value.item() == pytest.approx((0.5 - 2 + 4) * log2 / 3, rel=1e-6)
    found = mean_kl(logp, logq, mask, prompts, estimator="k1", log_sampler=sampler, truncate=3)
    assert found.value.item() == pytest.approx((0.5 - 2 + 3) * log2 / 3, rel=1e-6)


def test_kl_of_whole_responses_is_corrected_as_a_whole() -> None:
    """Over all responses of two tokens, each as often as the sampler draws it."""
    generator = torch.Generator().manual_seed(0)
    p, q, s = (torch.randn(9, dtype=torch.float64, generator=generator).log_softmax(0) for _ in range(3))
    kl = (p.exp() * (p - q)).sum()
    counts = (s.exp() * 1e4).round().long()
    rows = torch.arange(9).repeat_interleave(counts)
    logp, logq, sampler = (each[rows, None] for each in (p, q, s))
    found = mean_kl(logp, logq, torch.ones_like(logp).bool(), estimator="k1", log_sampler=sampler)
    assert found.value.item() == pytest.approx(kl.item(), rel=1e-3)
    assert found.value.item() != pytest.approx((logp - logq).mean().item(), rel=0.1)


def test_kl_of_extreme_log_probs_is_finite() -> None:
    mask = torch.ones(2, 2).bool()
    far = torch.tensor([[-1e4, -torch.inf], [0.0, -50.0]])
    for estimator in ("k1", "k2", "k3"):
        for p, q in ((far, -torch.ones(2, 2)), (-torch.ones(2, 2), far)):
            found = mean_kl(p, q, mask, estimator=estimator)
            assert all(each.isfinite() for each in found)


def kl_of_shapes(*shapes: tuple[int, ...], **settings: Any) -> Callable[[], Ratio]:
    logp, logq, mask = (torch.zeros(shape) for shape in shapes)
    return lambda: mean_kl(logp, logq, mask.bool(), **settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MeanKL("k4"), "'k4'; it has to be exact, k1, k2 or k3"),  # type: ignore[arg-type]
        (lambda: MeanKL("k1", per="prompt"), "per 'prompt'"),  # type: ignore[arg-type]
        (lambda: MeanKL("k1", truncate=0.0), "truncate is 0.0"),
        (lambda: MeanKL("exact", truncate=2.0), "exact, which has no weight"),
        (kl_of_shapes((2, 3, 4), (2, 3, 4), (2, 3), estimator="exact", log_sampler=torch.zeros(2, 3)), "no weight"),
        (kl_of_shapes((2, 3), (2, 3), (2, 3), estimator="exact"), r"shape \(2, 3\), where the mask asks for \(2, 3, 3"),
        (kl_of_shapes((2, 3, 4), (2, 3, 4), (2, 3), estimator="k1"), r"\(2, 3, 4\), where the mask asks for \(2, 3\)"),
        (kl_of_shapes((2, 3), (2, 1), (2, 3), estimator="k1"), "other policy have shape"),
        (kl_of_shapes((2, 3), (2, 3), (2, 3), estimator="k1", log_sampler=torch.zeros(2, 1)), "of the sampler have"),
        (kl_of_shapes((2, 3), (2, 3), (2, 3), estimator="k1", prompts=torch.zeros(3)), r"prompts have shape \(3,\)"),
        (lambda: mean_entropy(torch.zeros(2, 1), torch.ones(2, 3).bool()), r"entropies have shape \(2, 1\)"),
        (lambda: mean_length(torch.ones(2, 3).long()), "the mask has to be bool"),
        (lambda: mean_length(torch.ones(3).bool()), r"of shape \(B, T\)"),
        (lambda: truncated_share(torch.zeros(2, 3), torch.ones(2, 3).bool()), r"truncated have shape \(2, 3\)"),
    ],
)
def test_token_metrics_refuse(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_half_precision_is_summed_in_more() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5000, generator=generator).bfloat16()
    mask = torch.ones(2, 3).bool()
    expected = float(np.mean(reference.entropy(reference.log_softmax(logits))))
    assert mean_entropy(logits, mask).value.item() == pytest.approx(expected, rel=1e-6)
    logp, logq = logits, logits.roll(1, -1)
    kl = float(np.mean(reference.kl(logp, logq)))
    assert mean_kl(logp, logq, mask, estimator="exact").value.item() == pytest.approx(kl, rel=1e-5)
    one = torch.tensor([[-1.0]]).bfloat16()
    # The log-ratio is a bfloat16, its exponential is none.
    found = mean_kl(one, one / 128, mask[:1, :1], estimator="k3").value.item()
    assert found == pytest.approx(math.exp(127 / 128) - 1 - 127 / 128, rel=1e-12)


def test_responses_have_prompts_of_their_own_unless_told() -> None:
    data = make_data()
    own = torch.arange(len(data.mask))
    assert flat(mean_length(data.mask)) == flat(mean_length(data.mask, own))
    assert flat(mean_length(data.mask)) != flat(mean_length(data.mask, data.prompts))


# importance ratios


def test_effective_sample_size_by_hand() -> None:
    weights = torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=torch.float64)
    assert effective_sample_size(weights.log()).item() == pytest.approx(36 / (4 * 14), rel=1e-14)
    mask = torch.tensor([True, False, True, False])
    assert effective_sample_size(weights.log(), mask).item() == pytest.approx(16 / (2 * 10), rel=1e-14)


@pytest.mark.parametrize("size", [0.0, 200.0, -200.0, 1e4, -1e4])
def test_effective_sample_size_has_no_scale(size: float) -> None:
    log_ratios = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = reference.effective_share(log_ratios)
    assert 0.1 < expected < 0.9
    assert effective_sample_size(log_ratios + size).item() == pytest.approx(expected, rel=1e-10)
    assert effective_sample_size(torch.full((50,), size)).item() == pytest.approx(1.0)
    assert effective_sample_size(torch.tensor([size, size - 400, size - 400, size - 50])).item() == pytest.approx(0.25)


def test_effective_sample_size_that_is_unknown() -> None:
    inf = torch.inf
    for log_ratios in ([], [-inf, -inf], [inf, 0.0], [torch.nan, 0.0]):
        assert effective_sample_size(torch.tensor(log_ratios)).isnan(), log_ratios


def test_ratio_tail_by_hand() -> None:
    log_ratios = torch.tensor([[0.0, 2.0, 1.0], [-200.0, 200.0, 1.5]], dtype=torch.float64)
    assert flat(ratio_tail(log_ratios, 1.0)) == [3 / 6, 200.0]
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert flat(ratio_tail(log_ratios, 1.0, mask)) == [1 / 4, 2.0]
    assert flat(ratio_tail(log_ratios, 200.0)) == [0.0, 200.0]
    assert flat(ratio_tail(torch.tensor([-5.0, -3.0]), 0.0)) == [0.0, -3.0]


def test_ratio_tail_that_is_unknown() -> None:
    for log_ratios in ([], [torch.nan, 5.0]):
        assert all(math.isnan(each) for each in flat(ratio_tail(torch.tensor(log_ratios), 1.0)))
    with pytest.raises(ValueError, match="the threshold is NaN"):
        RatioTail(math.nan)
    for mask in (torch.ones(2).long(), torch.ones(3).bool()):
        with pytest.raises(ValueError, match="the mask has to be bool and of their shape"):
            ratio_tail(torch.zeros(2), 1.0, mask)


# classes


@dataclass(frozen=True)
class Data:
    """Twelve prompts of one to four responses each; first what there is of each prompt, then of each response.

    Tensors of responses are padded with NaN, and two rows are filler: no token, prompt -1.
    """

    correct: Tensor
    samples: Tensor
    x: Tensor
    y: Tensor
    answers: Tensor
    right: Tensor
    prompts: Tensor
    mask: Tensor
    logp: Tensor
    logq: Tensor
    sampler: Tensor
    full_p: Tensor
    full_q: Tensor
    entropies: Tensor
    log_ratios: Tensor
    truncated: Tensor
    texts: NDArray[np.str_]

    def of(self, first: int, last: int, filler: bool = True) -> "Data":
        """What there is of some of the prompts, with or without filler."""
        rows = (self.prompts >= first) & (self.prompts < last) | (filler & (self.prompts < 0))
        return self.choose(slice(first, last), rows)

    def choose(self, prompts: slice, rows: Tensor) -> "Data":
        """Of some prompts what is of prompts, and of some rows what is of responses."""
        values = [getattr(self, field.name) for field in fields(self)]
        return Data(*(value[prompts] for value in values[:6]), *(value[rows] for value in values[6:]))

    @property
    def real(self) -> Tensor:
        """(B,) bool, the rows that are no filler."""
        return self.prompts >= 0


PROMPTS = 12


def make_data() -> Data:
    rng = np.random.default_rng(4)
    x, y = draw_clusters(3, (PROMPTS,))
    counts = [1, 4, 2, 3, 4, 1, 3, 2, 4, 2, 3, 4]
    prompts = np.concatenate([np.repeat(np.arange(PROMPTS), counts), [-1, -1]])
    rng.shuffle(prompts)
    rows, tokens, vocabulary = len(prompts), 5, 4
    lengths = np.where(prompts < 0, 0, rng.integers(1, tokens + 1, rows))
    mask = np.arange(tokens) < lengths[:, None]
    full_p, full_q, full_sampler = (reference.log_softmax(rng.normal(size=(rows, tokens, vocabulary))) for _ in "pqs")
    sampled = rng.integers(0, vocabulary, (rows, tokens, 1))
    logp, logq, sampler = (np.take_along_axis(full, sampled, -1)[..., 0] for full in (full_p, full_q, full_sampler))
    log_ratios = rng.normal(size=(rows, tokens))
    for prompt, extreme in ((0, 200.0), (1, -200.0), (11, 201.0)):
        log_ratios[np.flatnonzero(prompts == prompt)[0], 0] = extreme
    entropies = rng.uniform(size=(rows, tokens))
    for padded in (logp, logq, sampler, full_p, full_q, log_ratios, entropies):
        padded[~mask] = np.nan
    arrays = [
        np.array([0, 4, 1, 2, 3, 8, 1, 2, 0, 5, 4, 1]),
        np.array([4, 4, 5, 6, 8, 8, 4, 5, 6, 7, 8, 9]),
        x,
        y,
        rng.integers(-1, 3, (PROMPTS, 4)),
        rng.integers(0, 3, PROMPTS),
        prompts,
        mask,
        logp,
        logq,
        sampler,
        full_p,
        full_q,
        entropies,
        log_ratios,
        rng.random(rows) < 0.4,
    ]
    columns: list[Any] = [*map(torch.from_numpy, arrays), rng.choice(["a", "b", "c"], rows)]
    return Data(*columns)


def flat(result: Tensor | tuple[Tensor, ...]) -> list[float]:
    return [each.item() for each in (result if isinstance(result, tuple) else (result,))]


class Case(NamedTuple):
    """A metric, its function, what both are given of the data, and what the reference makes of the data."""

    make: Callable[[], Metric]
    function: Callable[..., Any]
    arguments: Callable[[Data], tuple[Any, ...]]
    expected: Callable[[Data], list[float]]


def by_response(data: Data, values: Any, per: str) -> list[float]:
    """The reference of a ratio from (B, T) values of tokens."""
    numerators = [reference.masked_sum(row, mask) for row, mask in zip(values, data.mask, strict=True)]
    lengths = data.mask.sum(-1).tolist()
    denominators = lengths if per == "token" else [float(length > 0) for length in lengths]
    return reference.ratio_over_responses(numerators, denominators, data.prompts)


def estimated(estimator: str, per: str, corrected: bool, most: float | None) -> Callable[[Data], list[float]]:
    def expected(data: Data) -> list[float]:
        values = np.full(data.mask.shape, np.nan)
        for i, t in data.mask.nonzero().tolist():
            p, q, sampler = (float(each[i, t]) for each in (data.logp, data.logq, data.sampler))
            values[i, t] = reference.kl_estimate(p, q, estimator, sampler if corrected else None, most)
        return by_response(data, values, per)

    return expected


def kl_case(estimator: Any, per: Any, corrected: bool = False, most: float | None = None) -> Case:
    def function(p: Tensor, q: Tensor, mask: Tensor, prompts: Tensor, sampler: Tensor | None = None) -> Ratio:
        settings: dict[str, Any] = {"estimator": estimator, "per": per, "truncate": most}
        return mean_kl(p, q, mask, prompts, log_sampler=sampler, **settings)

    def arguments(data: Data) -> tuple[Any, ...]:
        if estimator == "exact":
            return data.full_p, data.full_q, data.mask, data.prompts
        return data.logp, data.logq, data.mask, data.prompts, *([data.sampler] if corrected else [])

    exact = estimator == "exact"
    return Case(
        lambda: MeanKL(estimator, per, most),
        function,
        arguments,
        (lambda data: by_response(data, reference.kl(data.full_p, data.full_q), per))
        if exact
        else estimated(estimator, per, corrected, most),
    )


def mean(values: Sequence[float]) -> list[float]:
    return [sum(values) / len(values)] if values else [math.nan]


CASES = {
    "pass@k": Case(
        lambda: PassAtK(3),
        lambda correct, samples: pass_at_k(correct, samples, 3).mean(),
        lambda data: (data.correct, data.samples),
        lambda data: mean(
            [
                reference.share_of_subsets_with_a_right_one(c, n, 3)
                for c, n in zip(data.correct.tolist(), data.samples.tolist(), strict=True)
            ]
        ),
    ),
    "majority": Case(
        MajorityVote,
        lambda answers, right: majority_vote(answers, right).mean(),
        lambda data: (data.answers, data.right),
        lambda data: mean([reference.majority(*each) for each in zip(data.answers, data.right.tolist(), strict=True)]),
    ),
    "ratio": Case(
        ClusteredRatio,
        clustered_ratio,
        lambda data: (data.x, data.y),
        lambda data: reference.ratio_by_prompts(data.x.tolist(), data.y.tolist()),
    ),
    "distinct": Case(
        DistinctShare,
        distinct_share,
        lambda data: (data.texts[data.real].tolist(), data.prompts[data.real]),
        lambda data: reference.ratio_by_prompts(
            [float(len(set(data.texts[data.prompts == prompt]))) for prompt in range(PROMPTS)],
            [float((data.prompts == prompt).sum()) for prompt in range(PROMPTS)],
        ),
    ),
    "kl, exact": kl_case("exact", "token"),
    "kl, exact, per response": kl_case("exact", "response"),
    "kl, k1": kl_case("k1", "token"),
    "kl, k2, per response": kl_case("k2", "response"),
    "kl, k3": kl_case("k3", "token"),
    "kl, k1, corrected": kl_case("k1", "response", corrected=True),
    "kl, k3, corrected": kl_case("k3", "token", corrected=True, most=1.5),
    "entropy": Case(
        MeanEntropy,
        mean_entropy,
        lambda data: (data.entropies, data.mask, data.prompts),
        lambda data: by_response(data, data.entropies, "token"),
    ),
    "entropy of logits": Case(
        MeanEntropy,
        mean_entropy,
        lambda data: (data.full_p + 7.0, data.mask, data.prompts),
        lambda data: by_response(data, reference.entropy(data.full_p), "token"),
    ),
    "length": Case(
        MeanLength,
        mean_length,
        lambda data: (data.mask, data.prompts),
        lambda data: by_response(data, np.ones(data.mask.shape), "response"),
    ),
    "truncated": Case(
        TruncatedShare,
        truncated_share,
        lambda data: (data.truncated, data.mask, data.prompts),
        lambda data: reference.ratio_over_responses(data.truncated.tolist(), data.real.tolist(), data.prompts),
    ),
    "effective sample size": Case(
        EffectiveSampleSize,
        effective_sample_size,
        lambda data: (data.log_ratios, data.mask),
        lambda data: [reference.effective_share(data.log_ratios[data.mask])],
    ),
    "tail": Case(
        lambda: RatioTail(1.0),
        lambda log_ratios, mask: ratio_tail(log_ratios, 1.0, mask),
        lambda data: (data.log_ratios, data.mask),
        lambda data: [np.mean([x > 1.0 for x in data.log_ratios[data.mask]]), max(data.log_ratios[data.mask]).item()],
    ),
}
SPLITS = [[12], [1] * 12, [5, 0, 7], [11, 1]]
each_metric = pytest.mark.parametrize("name", CASES)


def close(expected: list[float]) -> Any:
    return pytest.approx(expected, rel=1e-11)


def pieces(data: Data, split: list[int]) -> list[Data]:
    ends = np.cumsum(split).tolist()
    return [data.of(end - size, end) for end, size in zip(ends, split, strict=True)]


@each_metric
def test_function_and_class_match_the_reference(name: str) -> None:
    case, data = CASES[name], make_data()
    expected = case.expected(data)
    assert all(math.isfinite(each) for each in expected)
    result = case.function(*case.arguments(data))
    assert flat(result) == close(expected)
    assert {each.dtype for each in (result if isinstance(result, tuple) else (result,))} == {torch.float64}
    metric = case.make()
    metric.update(*case.arguments(data))
    assert type(metric.compute()) is type(result)
    assert flat(metric.compute()) == close(expected)


@pytest.mark.parametrize("split", SPLITS)
@each_metric
def test_any_split_into_batches_equals_the_whole(name: str, split: list[int]) -> None:
    case, data = CASES[name], make_data()
    metric, calls = case.make(), []
    for piece in pieces(data, split):
        calls.append(metric(*case.arguments(piece)))
    assert flat(metric.compute()) == close(case.expected(data))
    # What a call returns is of its own batch.
    last = case.function(*case.arguments(pieces(data, split)[-1]))
    assert flat(calls[-1]) == pytest.approx(flat(last), rel=1e-11, nan_ok=True)


@pytest.mark.parametrize("name", ["kl, exact", "kl, k2, per response", "entropy", "length", "truncated"])
def test_values_are_the_same_however_responses_are_split(name: str) -> None:
    case, data = CASES[name], make_data()
    metric = case.make()
    for rows in torch.arange(len(data.mask)).split(4):
        metric.update(*case.arguments(data.choose(slice(0, 0), rows)))
    assert flat(metric.compute())[:1] == close(case.expected(data)[:1])


@each_metric
def test_filler_and_empty_batches_change_nothing(name: str) -> None:
    case, data = CASES[name], make_data()
    metric = case.make()
    metric.update(*case.arguments(data.of(0, 0)))
    assert all(math.isnan(each) for each in flat(metric.compute()))
    metric.update(*case.arguments(data.of(0, 0, filler=False)))
    assert all(math.isnan(each) for each in flat(metric.compute()))
    metric.update(*case.arguments(data.of(0, PROMPTS, filler=False)))
    assert flat(metric.compute()) == close(case.expected(data))


@each_metric
def test_reset_forgets(name: str) -> None:
    case, data = CASES[name], make_data()
    metric = case.make()
    metric.update(*case.arguments(data.of(0, 7)))
    metric.reset()
    metric.update(*case.arguments(data.of(7, 12)))
    assert flat(metric.compute()) == close(flat(case.function(*case.arguments(data.of(7, 12)))))


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
@each_metric
def test_nothing_seen_is_unknown(name: str) -> None:
    assert all(math.isnan(each) for each in flat(CASES[name].make().compute()))


@each_metric
def test_sums_stay_exact_in_a_module_of_low_precision(name: str) -> None:
    case, data = CASES[name], make_data()
    metric = case.make()
    module = nn.ModuleList([metric])
    module.to(dtype=torch.bfloat16)
    metric.update(*case.arguments(data))
    module.to(dtype=torch.bfloat16)
    assert flat(metric.compute()) == close(case.expected(data))
    metric.reset()
    assert {getattr(metric, state).dtype for state in metric._defaults} == {torch.float64}


@each_metric
def test_a_copy_goes_on(name: str) -> None:
    case, data = CASES[name], make_data()
    metric = case.make()
    metric.update(*case.arguments(data.of(0, 7)))
    copy = pickle.loads(pickle.dumps(metric))
    copy.update(*case.arguments(data.of(7, 12)))
    assert flat(copy.compute()) == close(case.expected(data))


def test_sums_follow_to_another_device() -> None:
    assert ClusteredRatio().to("meta").sum_x.device.type == "meta"


# two processes

CUTS = (5, 12)  # 5 and 7 prompts; then all of them on one rank, and no call on the other


def main(rank: int, rendezvous: str) -> None:
    """One of two processes: prints what each metric is, and what was imported of the package."""
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    data, found = make_data(), {}
    for cut in CUTS:
        mine = data.of(0, cut) if rank == 0 else data.of(cut, PROMPTS)
        for name, case in CASES.items():
            metric = case.make()
            if rank == 0 or cut < PROMPTS:
                metric.update(*case.arguments(mine))
            found[f"{name}, {cut}"] = flat(metric.compute())
    dist.destroy_process_group()
    print(json.dumps({"found": found, "modules": [name for name in sys.modules if name.startswith("erpd_lightning.")]}))


def test_two_processes_equal_one(tmp_path: Path) -> None:
    arguments = [sys.executable, __file__]
    processes = [
        subprocess.Popen([*arguments, str(rank), f"file://{tmp_path}/rendezvous"], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    data = make_data()
    for output in map(json.loads, outputs):
        assert len(output["found"]) == len(CUTS) * len(CASES)
        for key, values in output["found"].items():
            assert values == close(CASES[key.rpartition(", ")[0]].expected(data)), key
        # Usable without anything else of the package.
        assert {name.split(".")[1] for name in output["modules"]} == {"metrics", "objectives"}


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
