"""Each metric against a reference in plain loops, by hand, over splits into batches, and over two processes.

Run as a program (`python test_metrics.py RANK RENDEZVOUS`) this is one of the two processes.
"""

import math
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    ImportanceStatistics,
    ImportanceSums,
    PassAtK,
    clustered_ratio,
    distinct_responses,
    empty_importance_sums,
    importance_statistics,
    importance_sums,
    merge_importance_sums,
    pass_at_k,
)
from support import reference
from support.processes import fork_ranks, start_ranks

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
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(k: int) -> None:
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


# distinct responses


def test_distinct_responses_by_hand() -> None:
    responses = ["1", "2", "1", "1", "1", "2"]
    prompts = torch.tensor([7, 7, 7, 3, 3, 9])
    assert distinct_responses(responses, prompts).tolist() == [1.0, 2.0, 1.0]  # prompts 3, 7 and 9
    as_tokens = [tuple(response) for response in responses]
    assert distinct_responses(as_tokens, prompts).tolist() == [1.0, 2.0, 1.0]
    assert distinct_responses([], torch.zeros(0).long()).tolist() == []
    with pytest.raises(ValueError, match=r"6 responses have 6 prompts, got shape \(5,\)"):
        distinct_responses(responses, prompts[:5])


# importance ratios

INTERVAL, TAIL = (0.5, 2.0), math.e


def row(values: Any) -> Tensor:
    """(1, T) float64."""
    return torch.as_tensor(values, dtype=torch.float64).reshape(1, -1)


def sums_of(log_ratios: Tensor, mask: Tensor | None = None, tail: float = TAIL) -> ImportanceSums:
    mask = torch.ones_like(log_ratios, dtype=torch.bool) if mask is None else mask
    return importance_sums(log_ratios, mask, INTERVAL, tail)


def statistics_of(log_ratios: Tensor, mask: Tensor | None = None, tail: float = TAIL) -> ImportanceStatistics:
    return importance_statistics(sums_of(log_ratios, mask, tail))


def effective_sample_size(log_ratios: Tensor, mask: Tensor | None = None) -> Tensor:
    return statistics_of(log_ratios, mask).effective_sample_size


def stacked(parts: Sequence[ImportanceSums]) -> ImportanceSums:
    return ImportanceSums(*(torch.stack(field) for field in zip(*parts, strict=True)))


def test_effective_sample_size_by_hand() -> None:
    weights = row([1.0, 2.0, 3.0, 0.0])
    assert effective_sample_size(weights.log()).item() == pytest.approx(36 / (4 * 14), rel=1e-14)
    mask = torch.tensor([[True, False, True, False]])
    assert effective_sample_size(weights.log(), mask).item() == pytest.approx(16 / (2 * 10), rel=1e-14)


@pytest.mark.parametrize("size", [0.0, 200.0, -200.0, 1e4, -1e4])
def test_effective_sample_size_has_no_scale(size: float) -> None:
    log_ratios = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = reference.effective_share(log_ratios)
    assert 0.1 < expected < 0.9
    assert effective_sample_size(row(log_ratios + size)).item() == pytest.approx(expected, rel=1e-10)
    assert effective_sample_size(torch.full((1, 50), size)).item() == pytest.approx(1.0)
    assert effective_sample_size(row([size, size - 400, size - 400, size - 50])).item() == pytest.approx(0.25)


def test_effective_sample_size_that_is_unknown() -> None:
    inf = torch.inf
    for log_ratios in ([], [-inf, -inf], [inf, 0.0], [torch.nan, 0.0]):
        assert effective_sample_size(row(log_ratios)).isnan(), log_ratios


def test_ratio_tail_by_hand() -> None:
    def tail(log_ratios: Tensor, threshold: float, mask: Tensor | None = None) -> list[float]:
        """Share above a threshold in nats, and the greatest log-ratio."""
        found = statistics_of(log_ratios, mask, math.exp(threshold))
        return [found.tail_share.item(), found.max_log_ratio.item()]

    log_ratios = torch.tensor([[0.0, 2.0, 1.0], [-200.0, 200.0, 1.5]], dtype=torch.float64)
    assert tail(log_ratios, 1.0) == [3 / 6, 200.0]
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert tail(log_ratios, 1.0, mask) == [1 / 4, 2.0]
    assert tail(log_ratios, 200.0) == [0.0, 200.0]
    assert tail(row([-5.0, -3.0]), 0.0) == [0.0, -3.0]


def test_clipped_share_by_hand() -> None:
    log_ratios = row([0.25, 0.5, 1.0, 2.0, 4.0]).log()
    assert statistics_of(log_ratios).clipped_share.item() == 2 / 5
    assert statistics_of(log_ratios, torch.tensor([[True, True, True, False, False]])).clipped_share.item() == 1 / 3


def test_ratios_without_a_lower_bound_are_not_clipped_below() -> None:
    sums = importance_sums(row([-torch.inf, -800.0, 1.0]), torch.ones(1, 3).bool(), (0.0, 2.0), TAIL)
    assert importance_statistics(sums).clipped_share.item() == 1 / 3


def test_statistics_that_are_unknown() -> None:
    for log_ratios in ([], [torch.nan, 5.0]):
        assert all(math.isnan(each) for each in flat(statistics_of(row(log_ratios))))
    assert all(math.isnan(each) for each in flat(importance_statistics(empty_importance_sums())))


@pytest.mark.parametrize("split", [[6], [1] * 6, [2, 0, 4]])
def test_merged_sums_equal_the_sums_of_the_whole(split: list[int]) -> None:
    data = make_data()
    log_ratios, mask = data.log_ratios[:6], data.mask[:6]
    parts = [sums_of(*part) for part in zip(log_ratios.split(split), mask.split(split), strict=True)]
    merged = merge_importance_sums(stacked([empty_importance_sums(), *parts]))
    assert flat(merged) == close(flat(sums_of(log_ratios, mask)))
    again = merge_importance_sums(stacked([merged, merged]))
    assert flat(importance_statistics(again)) == close(flat(importance_statistics(merged)))
    assert again.tokens.item() == 2 * merged.tokens.item()


def test_importance_functions_refuse() -> None:
    for mask in (torch.ones(1, 2).long(), torch.ones(1, 3).bool()):
        with pytest.raises(ValueError, match="the mask has to be bool and of their shape"):
            sums_of(torch.zeros(1, 2), mask)
    with pytest.raises(ValueError, match=r"log-ratios of \(2,\)"):
        sums_of(torch.zeros(2))
    for interval, tail in (((1.0, 0.5), 2.0), ((-1.0, 0.5), 2.0), ((math.nan, 1.0), 2.0)):
        with pytest.raises(ValueError, match="interval is"):
            importance_sums(torch.zeros(1, 2), torch.ones(1, 2).bool(), interval, tail)
    for tail in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="tail is"):
            sums_of(torch.zeros(1, 2), tail=tail)
    sums = sums_of(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="vectors of one length"):
        merge_importance_sums(sums)
    with pytest.raises(ValueError, match="vectors of one length"):
        merge_importance_sums(ImportanceSums(*(field[None][:0] for field in sums)))
    with pytest.raises(ValueError, match="have to be scalars"):
        importance_statistics(stacked([sums, sums]))


# classes


@dataclass(frozen=True)
class Data:
    """Twelve prompts, and one to four responses to each; two rows without tokens, of prompt -1, are dummies."""

    correct: Tensor
    samples: Tensor
    x: Tensor
    y: Tensor
    prompts: Tensor
    mask: Tensor
    log_ratios: Tensor

    def of(self, first: int, last: int) -> "Data":
        """The data of some of the prompts, with the dummy rows."""
        rows = (self.prompts >= first) & (self.prompts < last) | (self.prompts < 0)
        by_prompt = (value[first:last] for value in (self.correct, self.samples, self.x, self.y))
        return Data(*by_prompt, *(value[rows] for value in (self.prompts, self.mask, self.log_ratios)))


PROMPTS = 12


def make_data() -> Data:
    rng = np.random.default_rng(4)
    x, y = draw_clusters(3, (PROMPTS,))
    counts = [1, 4, 2, 3, 4, 1, 3, 2, 4, 2, 3, 4]
    prompts = np.concatenate([np.repeat(np.arange(PROMPTS), counts), [-1, -1]])
    rng.shuffle(prompts)
    rows, tokens = len(prompts), 5
    lengths = np.where(prompts < 0, 0, rng.integers(1, tokens + 1, rows))
    mask = np.arange(tokens) < lengths[:, None]
    log_ratios = rng.normal(size=(rows, tokens))
    for prompt, extreme in ((0, 200.0), (1, -200.0), (11, 201.0)):
        log_ratios[np.flatnonzero(prompts == prompt)[0], 0] = extreme
    log_ratios[~mask] = np.nan
    arrays = [
        np.array([0, 4, 1, 2, 3, 8, 1, 2, 0, 5, 4, 1]),
        np.array([4, 4, 5, 6, 8, 8, 4, 5, 6, 7, 8, 9]),
        x,
        y,
        prompts,
        mask,
        log_ratios,
    ]
    return Data(*map(torch.from_numpy, arrays))


def flat(result: Tensor | tuple[Tensor, ...]) -> list[float]:
    return [each.item() for each in (result if isinstance(result, tuple) else (result,))]


class Case(NamedTuple):
    """A metric, its function, what both are given of the data, and what the reference makes of the data."""

    make: Callable[[], Metric]
    function: Callable[..., Any]
    arguments: Callable[[Data], tuple[Any, ...]]
    expected: Callable[[Data], list[float]]


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
    "ratio": Case(
        ClusteredRatio,
        clustered_ratio,
        lambda data: (data.x, data.y),
        lambda data: reference.ratio_by_prompts(data.x.tolist(), data.y.tolist()),
    ),
}
SPLITS = [[12], [1] * 12, [5, 0, 7], [11, 1]]
each_metric = pytest.mark.parametrize("name", CASES)


def close(expected: list[float]) -> Any:
    return pytest.approx(expected, rel=1e-11)


def parts_of(data: Data, split: list[int]) -> list[Data]:
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
    for part in parts_of(data, split):
        calls.append(metric(*case.arguments(part)))
    assert flat(metric.compute()) == close(case.expected(data))
    # What a call returns is of its own batch.
    last = case.function(*case.arguments(parts_of(data, split)[-1]))
    assert flat(calls[-1]) == pytest.approx(flat(last), rel=1e-11, nan_ok=True)


@each_metric
def test_empty_batches_change_nothing(name: str) -> None:
    case, data = CASES[name], make_data()
    metric = case.make()
    metric.update(*case.arguments(data.of(0, 0)))
    assert all(math.isnan(each) for each in flat(metric.compute()))
    metric.update(*case.arguments(data.of(0, PROMPTS)))
    assert flat(metric.compute()) == close(case.expected(data))


def test_importance_statistics_match_the_reference() -> None:
    data = make_data()
    log_ratios = data.log_ratios[data.mask].numpy()
    ratios = [math.exp(min(log_ratio, 300.0)) for log_ratio in log_ratios]
    expected = [
        reference.effective_share(data.log_ratios[data.mask]),
        log_ratios.max(),
        np.mean([ratio > TAIL for ratio in ratios]),
        np.mean([not INTERVAL[0] <= ratio <= INTERVAL[1] for ratio in ratios]),
    ]
    found = statistics_of(data.log_ratios, data.mask)
    assert flat(found) == close(expected)
    assert {each.dtype for each in found} == {torch.float64}


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


def see(folder: Path, processes: int) -> dict[str, Any]:
    """What each metric is in one of two processes, and what was imported of the package."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    data, found = make_data(), {}
    for cut in CUTS:
        mine = data.of(0, cut) if rank == 0 else data.of(cut, PROMPTS)
        for name, case in CASES.items():
            metric = case.make()
            if rank == 0 or cut < PROMPTS:
                metric.update(*case.arguments(mine))
            found[f"{name}, {cut}"] = flat(metric.compute())
    dist.destroy_process_group()
    return {"found": found, "modules": [name for name in sys.modules if name.startswith("erpd_lightning.")]}


def test_two_processes_equal_one(tmp_path: Path) -> None:
    data = make_data()
    for seen in start_ranks(__file__, tmp_path):
        assert len(seen["found"]) == len(CUTS) * len(CASES)
        for key, values in seen["found"].items():
            assert values == close(CASES[key.rpartition(", ")[0]].expected(data)), key
        # Usable without anything else of the package.
        assert {name.split(".")[1] for name in seen["modules"]} == {"metrics"}


if __name__ == "__main__":
    sys.exit(fork_ranks(see, Path(sys.argv[1])))
