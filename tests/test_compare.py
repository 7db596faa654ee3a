"""The comparison of methods: as many verified rollouts for each, and a frontier that is a polygon."""

import importlib
import sys
from pathlib import Path

import pytest

from erpd_lightning.objectives.signal import AutoSignal
from support.chain import DEMO
from test_configs import fit

sys.path.insert(0, str(DEMO.parents[1] / "benchmarks"))
compare = importlib.import_module("compare")


@pytest.mark.parametrize("group_size", [4, 8])
@pytest.mark.parametrize(
    ("method", "rollouts"),
    [
        ("erpd_auto", 12288),
        ("erpd_0.08", 4096),
        ("erpd_replay", 12288),
        ("erpd_replay_batch", 12288),
        ("erpd_short", 4096),
        ("erpd_short_batch", 4096),
        ("grpo", 12288),
    ],
)
def test_methods_take_as_many_verified_rollouts(
    method: str, rollouts: int, group_size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rounds = fit(monkeypatch, "--config", DEMO, *compare.methods(group_size)[method], "--run_dir", tmp_path)
    data = rounds.builder.data(store="", tokenizer="")
    assert data.group_size == group_size
    assert data.prompts_per_round is not None
    sampled, previewed = data.prompts_per_round * group_size, 0
    signal = rounds.builder.module("distill", policy="").signal
    if isinstance(signal, AutoSignal):
        sampled -= signal.prompts * group_size
        previewed = signal.prompts * signal.samples * len(signal.candidates())
    assert (sampled + previewed) * rounds.rounds == rollouts


def test_the_frontier_is_interpolated_at_the_kl_of_the_student() -> None:
    def point(method: str, seed: int, kl: float, accuracy: float) -> object:
        return compare.Point(method, seed, 4096, accuracy, 0.01, kl, kl, 0.001, 1.0)

    rivals = [("base", 0.0, 0.3), *zip(compare.SAPO_KL, (0.08, 0.04, 0.02, 0.01), (0.7, 0.6, 0.5, 0.4), strict=True)]
    found = [point(method, seed, kl, accuracy) for seed in (0, 1) for method, kl, accuracy in rivals]
    found += [point("erpd", 0, 0.03, 0.6), point("erpd", 1, 0.1, 0.68), point("erpd: teacher, last", 0, 0.03, 0.9)]
    said = "erpd minus the frontier of SAPO with a KL term, 4,096 rollouts: +0.015 on average, worst -0.020, 2 seeds\n"
    assert compare.frontier(found, 4096) == said
