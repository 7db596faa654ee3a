"""pass@k and clustered ratios against references in NumPy and by enumeration."""

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from erpd_lightning.metrics import ClusteredRatio, PassAtK, Ratio, clustered_ratio, pass_at_k

Floats = NDArray[np.float64]


def share_of_subsets_with_a_right_one(correct: int, samples: int, k: int) -> float:
    right = [i < correct for i in range(samples)]
    subsets = list(combinations(right, k))
    return sum(any(subset) for subset in subsets) / len(subsets)


def reference_ratio(x: Floats, y: Floats) -> tuple[float, float]:
    """Standard error of the mean linearised residual, in units of the mean denominator."""
    ratio = np.mean(x) / np.mean(y)
    residuals = x - ratio * y
    return float(ratio), float(np.std(residuals, ddof=1) / np.sqrt(len(x)) / abs(np.mean(y)))


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
    expected = [share_of_subsets_with_a_right_one(c, n, k) for c, n in cases]
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
    assert (ratio.value.item(), ratio.stderr.item()) == pytest.approx(reference_ratio(x, y))


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


# classes

SPLITS = [[12], [1] * 12, [5, 0, 7], [11, 1]]


def prompts() -> tuple[Tensor, Tensor]:
    samples = torch.tensor([4, 4, 5, 6, 8, 8, 4, 5, 6, 7, 8, 9])
    return torch.tensor([0, 4, 1, 2, 3, 8, 1, 2, 0, 5, 4, 1]), samples


def clusters() -> tuple[Tensor, Tensor]:
    x, y = draw_clusters(3, (12,))
    return torch.from_numpy(x), torch.from_numpy(y)


@pytest.mark.parametrize("split", SPLITS)
def test_any_split_into_batches_equals_the_whole(split: list[int]) -> None:
    passed, ratio = PassAtK(3), ClusteredRatio()
    for batch in zip(*(t.split(split) for t in (*prompts(), *clusters())), strict=True):
        passed.update(*batch[:2])
        ratio.update(*batch[2:])
    cases = torch.stack(prompts(), dim=1).tolist()
    expected = [share_of_subsets_with_a_right_one(c, n, 3) for c, n in cases]
    assert passed.compute().item() == pytest.approx(np.mean(expected), rel=1e-14)
    result = ratio.compute()
    assert isinstance(result, Ratio)
    x, y = clusters()
    assert [t.item() for t in result] == pytest.approx(reference_ratio(x.numpy(), y.numpy()))


def test_reset_forgets() -> None:
    ratio = ClusteredRatio()
    ratio.update(torch.tensor([9.0, 9.0]), torch.tensor([1.0, 1.0]))
    ratio.reset()
    ratio.update(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
    assert [t.item() for t in ratio.compute()] == [1.0, 0.5]


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_nothing_seen_is_unknown() -> None:
    assert PassAtK(1).compute().isnan()
    assert all(t.isnan() for t in ClusteredRatio().compute())


def test_sums_stay_exact_in_a_module_of_low_precision() -> None:
    ratio, passed = ClusteredRatio(), PassAtK(1)
    module = nn.ModuleList([ratio, passed])
    module.to(dtype=torch.bfloat16)
    assert ratio.sum_x.dtype == passed.prompts.dtype == torch.float64
    ratio.update(torch.ones(301), torch.ones(301))
    passed.update(torch.ones(301).long(), torch.ones(301).long())
    module.to(dtype=torch.bfloat16)
    assert ratio.sum_x.item() == passed.prompts.item() == 301  # not a bfloat16
    ratio.reset()
    assert ratio.sum_x.dtype == torch.float64


def test_sums_follow_to_another_device() -> None:
    assert ClusteredRatio().to("meta").sum_x.device.type == "meta"


RANK = """
import sys, torch, torch.distributed as dist
from erpd_lightning.metrics import ClusteredRatio, PassAtK
rank, rendezvous, data = int(sys.argv[1]), sys.argv[2], torch.load(sys.argv[3], weights_only=True)
dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
for first in (5, 12):  # 5 and 7 prompts; then all of them on one rank
    mine = [t[:first] if rank == 0 else t[first:] for t in data]
    passed, ratio = PassAtK(3), ClusteredRatio()
    passed.update(*mine[:2])
    ratio.update(*mine[2:])
    print(passed.compute().item(), *(t.item() for t in ratio.compute()))
dist.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path: Path) -> None:
    torch.save([*prompts(), *clusters()], tmp_path / "data.pt")
    arguments = [f"file://{tmp_path}/rendezvous", str(tmp_path / "data.pt")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), *arguments], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    ratio = clustered_ratio(*clusters())
    expected = [pass_at_k(*prompts(), 3).mean().item(), ratio.value.item(), ratio.stderr.item()]
    for output in outputs:
        lines = output.splitlines()
        assert len(lines) == 2
        for line in lines:
            assert [float(word) for word in line.split()] == pytest.approx(expected, rel=1e-12)
