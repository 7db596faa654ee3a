"""Each metric against a reference in plain loops, over splits into batches, and over two processes."""

import math
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchmetrics import Metric

from erpd_lightning.metrics import (
    ClusteredRatio,
    PassAtK,
    clustered_ratio,
    pass_at_k,
)
from support import reference
from support.metric_inputs import (
    INTERVAL,
    PROMPTS,
    TAIL,
    Data,
    close,
    flat,
    make_data,
    statistics_of,
)
from support.processes import fork_ranks, start_ranks


class Case(NamedTuple):
    """A metric, its function, what both are given of the data, and what the reference makes of the data."""

    make: Callable[[], Metric]
    function: Callable[..., Any]
    arguments: Callable[[Data], tuple[Any, ...]]
    expected: Callable[[Data], list[float]]


def mean(values: Sequence[float]) -> list[float]:
    """The mean and its standard error."""
    value = sum(values) / len(values)
    variance = sum((each - value) ** 2 for each in values) / (len(values) - 1)
    return [value, math.sqrt(variance / len(values))]


CASES = {
    "pass@k": Case(
        lambda: PassAtK(3),
        lambda correct, samples: clustered_ratio(pass_at_k(correct, samples, 3), torch.ones(len(correct))),
        lambda data: (data.correct, data.samples),
        lambda data: mean(
            [
                reference.share_of_subsets_with_a_correct_one(c, n, 3)
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


# Two processes (see `processes.py`)

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
