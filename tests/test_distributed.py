"""Two processes do what one does: the same steps, the same validation, the same stores, and the whole chain.

Nothing here runs several processes inside of pytest's: a subprocess does, which is started once.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samples import read_samples
from support import ranks
from support.chain import arguments
from support.kills import CHECKPOINT, EVALUATION, Kill, written
from support.policies import TASK, make_rows, save_policies, write_prompts, write_rollouts
from support.processes import ENVIRONMENT, ROOT, start_ranks
from support.runs import Runs, contents
from support.trainers import score

UNCUT = next(iter(ranks.CUTS))


# The same steps and the same validation.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policies, rollouts of unequal length with scores, and prompts."""
    folder = tmp_path_factory.mktemp("distributed")
    data = RolloutDataModule(folder / "rollouts", folder / "base", scores=folder / "scores")
    write_rollouts(folder / "rollouts", make_rows())
    for name, policy in save_policies(folder, "base", "teacher", "unlearned").items():
        score(data, name, policy)
    write_prompts(folder / "prompts.jsonl", [(row["prompt"], row["answer"]) for row in TASK.prompts(0)[0][:5]])
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    """What one process sees."""
    return ranks.see(folder, 1)


@pytest.fixture(scope="module")
def two(folder: Path, one: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of two processes sees."""
    return start_ranks(ranks.__file__, folder)


@pytest.mark.parametrize("cut", ranks.CUTS)
@pytest.mark.parametrize("module", ranks.MODULES)
def test_a_step_is_the_same_however_it_is_cut(
    module: str, cut: str, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    whole = one[f"{module}, {UNCUT}"]
    sizes = whole["tokens"]
    assert len(whole["gradients"]) == len(sizes)  # one micro-batch a step: nothing was cut
    for seen in (one[f"{module}, {cut}"], *(rank[f"{module}, {cut}"] for rank in two)):
        assert len(seen["gradients"]) == len(sizes)
        for gradient, expected in zip(seen["gradients"], whole["gradients"], strict=True):
            assert expected.norm() > 0.1
            assert (gradient - expected).norm() <= 3e-6 * expected.norm()  # float32, summed in another order
        for logged, expected in zip(seen["logged"], whole["logged"], strict=True):
            assert logged == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert seen["epoch"] == pytest.approx(whole["epoch"], rel=1e-6, abs=1e-6)


def test_the_cuts_are_uneven_and_some_micro_batches_empty(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    """Without this the test above would prove little."""
    whole = one[f"sapo, {UNCUT}"]["tokens"]
    assert len(set(whole)) == len(whole) == 3
    for name, ranks_see in {cut: [rank[f"sapo, {cut}"]["tokens"] for rank in two] for cut in ranks.CUTS}.items():
        assert len(ranks_see[0]) == len(ranks_see[1]), name
        micro_batches = len(ranks_see[0]) // 3
        steps = [[sum(seen[n * micro_batches : (n + 1) * micro_batches]) for n in range(3)] for seen in ranks_see]
        assert [a + b for a, b in zip(*steps, strict=True)] == whole
        assert all(a != b for a, b in zip(*steps, strict=True)), f"{name}: both processes have as many tokens"
        if micro_batches > 1:
            assert 0 in ranks_see[0][-micro_batches:] + ranks_see[1][-micro_batches:], f"{name}: no dummy micro-batch"


@pytest.mark.parametrize("batches", ranks.BATCHES)
def test_validation_says_the_same(batches: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert 0 < one[batches]["val/pass@1"] < 1
    assert one[batches]["val/kl_per_token"] > 0.1
    for rank in two:
        assert rank[batches] == pytest.approx(one[batches], rel=1e-6)


@pytest.mark.parametrize("batches", ranks.BATCHES)
def test_the_responses_of_all_processes_are_kept(
    batches: str, folder: Path, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    size = ranks.BATCHES[batches]
    expected, found = (read_samples(ranks.samples_file(folder, processes, size)) for processes in (1, 2))
    assert [(row["group"], row["sample"]) for row in found] == [(g, s) for g in range(5) for s in range(2)]
    for row, other in zip(found, expected, strict=True):
        assert row.pop("kls") == pytest.approx(other.pop("kls"), rel=1e-4, abs=1e-6)
        assert row == other


def test_a_gradient_that_is_not_finite_on_one_process_stops_both(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert "optimiser step 2: loss or gradient is not finite" in rank["divergence"]["message"]
        assert rank["divergence"]["steps"] == 1
        assert rank["divergence"]["weights"].isfinite().all()
    assert torch.equal(two[0]["divergence"]["weights"], two[1]["divergence"]["weights"])


def test_a_kl_budget_is_measured_together(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert one["budgets"]["measured"][0] > 0.1
    for rank in two:
        assert rank["budgets"]["measured"] == pytest.approx(one["budgets"]["measured"], rel=1e-6)


def test_an_overrun_that_one_process_sees_stops_both(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert (one["budgets"]["steps"], one["budgets"]["reasons"]) == (3, [])
    for rank in two:
        assert rank["budgets"]["steps"] == 2
        assert rank["budgets"]["reasons"][0].startswith("step 2: ")
        assert rank["budgets"]["reasons"][1:] == ["exceeded"]


# The whole chain.

OVERRIDES: dict[str, Any] = {
    "data.batch_size": 12,
    "data.max_tokens": 96,
    "data.sampler.batch_size": 32,
}


def command(run_dir: Path, alone: Path) -> list[str]:
    """The chain in two processes, from the base policy and prompts of a run that went alone."""
    given = {
        "task": "null",
        "policy": alone / "base",
        "data.prompts": alone / "prompts" / "train.jsonl",
        "data.validation_prompts": alone / "prompts" / "validation.jsonl",
        "trainer.devices": 2,
        "trainer.strategy": "ddp",
    }
    argv = arguments(run_dir, **OVERRIDES, **given)
    return [argument for argument in argv if not argument.startswith("--task.")]


@pytest.fixture(scope="module")
def alone(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    runs.run(arguments(run_dir, **OVERRIDES))
    return run_dir


@pytest.fixture(scope="module")
def together(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, started as a user starts it."""
    run_dir = tmp_path_factory.mktemp("together") / "run"
    argv = [sys.executable, "-m", "erpd_lightning", *command(run_dir, alone)]
    done = subprocess.run(argv, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The student lies in" in done.stdout
    assert done.stdout.count("KL/token to first") == 1, "both processes printed the table"
    return run_dir


def losses(run_dir: Path, stage: str) -> list[float]:
    """The logged loss of each optimiser step of a stage."""
    path = run_dir / "round-1" / stage / "metrics" / "version_0" / "metrics.csv"
    with path.open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def test_two_processes_sample_and_score_what_one_does(alone: Path, together: Path) -> None:
    stores = [json.loads((run / "round-1/rollouts/manifest.json").read_text()) for run in (alone, together)]
    assert len(stores[0]["parts"]) > 2
    assert stores[0]["fingerprint"] == stores[1]["fingerprint"]
    scores = [json.loads((run / "round-1/scoring/base/manifest.json").read_text()) for run in (alone, together)]
    assert scores[0]["fingerprint"] == scores[1]["fingerprint"]


def test_two_processes_end_the_chain_like_one(alone: Path, together: Path) -> None:
    for stage in ("extreme_region", "unlearned"):
        assert len(losses(alone, stage)) > 2
        assert losses(together, stage) == pytest.approx(losses(alone, stage), rel=1e-3, abs=1e-4)
    # Rounding differs, hence now and then a token that is drawn: what is sampled from trained policies differs too.
    [expected], [found] = (json.loads((run / "summary.json").read_text())["rounds"] for run in (alone, together))
    assert found["policies"].keys() == expected["policies"].keys()
    assert found["policies"]["base"] == pytest.approx(expected["policies"]["base"], rel=1e-6)
    assert found["rollouts"] == expected["rollouts"]


def test_two_processes_that_are_killed_end_the_same(runs: Runs, alone: Path, together: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    kills = (
        written(r"rollouts/part-00002\.parquet"),
        written(f"extreme_region/checkpoints/{CHECKPOINT}", count=2),
        Kill(f"{EVALUATION}.evaluate", count=2),
    )
    runs.run_killed(command(run_dir, alone), kills, processes=2)
    assert contents(run_dir) == contents(together)
