"""Killed with SIGKILL wherever it hurts and started again with the same command, a run ends as if nothing had happened.

Each case of a stage starts from a finished run whose later stages are taken away, is killed again and again at the
points listed, and must end up with the very files that the uninterrupted run made. What comes before a stage is the
same by the cases before; a last test kills one whole run of two rounds.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.chain import arguments
from support.kills import CHECKPOINT, EVALUATION, MODULE, Kill, after, written
from support.runs import Runs, contents, without_seconds

STAGES = {
    "base": "prepare",
    "rollouts": "round-1/rollouts",
    "extreme_region": "round-1/extreme_region",
    "unlearned": "round-1/unlearned",
    "scoring": "round-1/scoring",
    "distill": "round-1/distill",
    "evaluation": "round-1/evaluation",
}
"""The stages of the first round in their order, and where they lie."""

OVERRIDES = {
    "rounds": 2,
    "data.batch_size": 16,  # eight steps in an epoch of distillation
    "data.sampler.batch_size": 32,  # four parts in a store of rollouts
    "data.max_tokens": 96,  # two micro-batches or more in a step
    "distill_trainer": "{max_epochs: 2, val_check_interval: 0.5}",  # beta is corrected in the middle of epochs too
    "trainer.num_sanity_val_steps": 1,
}

KILLS = {
    "base": [
        written("prepare/started.json"),
        Kill("open", r"prepare/initial\.partial/config\.json"),
        written("demonstrations/manifest.json"),
        Kill(f"{MODULE}.training_step", count=32, trains=True),
        written(CHECKPOINT, count=3, trains=True),
        Kill("open", r"run/base\.partial/config\.json"),
    ],
    "rollouts": [
        written(r"rollouts/part-00001\.parquet"),
        after(written(r"rollouts/part-00003\.parquet")),
        written("rollouts/manifest.json"),
    ],
    "extreme_region": [
        after(written(CHECKPOINT, trains=True)),
        Kill(f"{MODULE}.on_train_epoch_end", trains=True),  # after the last step of the epoch, and its validation
        Kill(f"{EVALUATION}.evaluate", trains=True),
        Kill(f"{MODULE}.export"),
        Kill("open", r"teacher\.partial/config\.json"),
        after(written("extreme_region/teacher")),
    ],
    "unlearned": [
        written(CHECKPOINT + r"\.partial"),
    ],
    "scoring": [
        written(r"scoring/base/part-00001\.parquet"),
        written("scoring/teacher/manifest.json"),
    ],
    "distill": [
        Kill(f"{MODULE}.training_step", count=8, trains=True),
        Kill(
            "erpd_lightning.modules.evaluation:EvaluationModule.evaluate", count=2, trains=True
        ),  # in the middle of an epoch, at step 4
        Kill("erpd_lightning.modules.distill:DistillModule.on_validation_epoch_end", count=2, trains=True),
        after(written(r"step=8\.ckpt", trains=True)),  # between two epochs
        written(CHECKPOINT, count=2, trains=True),
        Kill(
            "erpd_lightning.budget.interpolation:WeightInterpolation.move_to", count=2
        ),  # between the trained student and the budget
        Kill(f"{MODULE}.export"),
    ],
    "evaluation": [
        Kill(f"{EVALUATION}.evaluate"),
        written("evaluation/teacher/stage.json"),
        after(written("evaluation/teacher/stage.json")),
        Kill(f"{EVALUATION}.evaluate", count=2),
    ],
}
"""For each stage where it is killed, in this order, before it is let be."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    server = Runs(tmp_path_factory.mktemp("server"), part_tokens=512)
    yield server
    server.close()


def command(run_dir: Path) -> list[str]:
    """What starts the run, the first time and after every kill."""
    return arguments(run_dir, **OVERRIDES)


@pytest.fixture(scope="module")
def reference(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted; what it printed lies beside it."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    _, printed = runs.run(command(run_dir))
    run_dir.with_name("printed").write_text(printed)
    return run_dir


def follows(stage: str) -> list[str]:
    """Where the stages that come after one of the first round lie, and what else is made after it."""
    names = list(STAGES)
    later = [STAGES[name] for name in names[names.index(stage) + 1 :]]
    return [*later, "round-2", "summary.json"]


def before(stage: str, reference: Path, run_dir: Path) -> Path:
    """A copy of a finished run as it was when a stage of the first round was about to begin."""
    if stage == "base":
        return run_dir
    shutil.copytree(reference, run_dir)
    for name in (STAGES[stage], *follows(stage)):
        path = run_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return run_dir


def saved_steps(run_dir: Path, stage: str) -> int:
    """The optimiser step of the latest checkpoint of a stage."""
    found = [int(path.stem.split("=")[1]) for path in run_dir.glob(f"{STAGES[stage]}/checkpoints/step=*.ckpt")]
    return max(found, default=0)


def parts(run_dir: Path, stage: str) -> dict[Path, int]:
    """The parts of a stage's stores, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in run_dir.glob(f"{STAGES[stage]}/**/part-*.parquet")}


@pytest.mark.parametrize("stage", KILLS)
def test_a_stage_killed_at_any_point_ends_the_same(stage: str, runs: Runs, reference: Path, tmp_path: Path) -> None:
    run_dir = before(stage, reference, tmp_path / "run")
    record = rf"{STAGES[stage]}/(student/)?stage\.json"
    resumed: int | None = None
    kept: dict[Path, int] = {}
    for kill in [*KILLS[stage], written(record), after(written(record))]:
        steps, printed = runs.run(command(run_dir), kill)
        assert "[round 2/2]" not in printed, f"{kill} came too late"
        if resumed is not None:
            assert steps[0] == resumed, f"began with step {steps[0]}, not with the checkpoint's, before {kill}"
        resumed = saved_steps(run_dir, stage) if kill.trains else None
        assert resumed != 0, f"{kill} came before any checkpoint"
        if stage in ("rollouts", "scoring"):
            assert kept.items() <= parts(run_dir, stage).items(), f"parts were made again before {kill}"
            kept = parts(run_dir, stage)
    later = tuple(follows(stage))
    expected = {name: digest for name, digest in contents(reference).items() if not name.startswith(later)}
    assert contents(run_dir) == expected


def test_two_rounds_killed_between_and_within_end_the_same(runs: Runs, reference: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    runs.run(command(run_dir), written("summary.json"))
    runs.run(command(run_dir), after(written("summary.json")))
    runs.run(command(run_dir), written("round-2/distill/checkpoints/" + CHECKPOINT))
    runs.run(command(run_dir), written("summary.json"))
    assert len(json.loads((run_dir / "summary.json").read_text())["rounds"]) == 1
    _, printed = runs.run(command(run_dir))
    assert "[round 2/2] evaluation" in printed
    assert contents(run_dir) == contents(reference)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (run_dir, reference)]
    assert without_seconds(summaries[0]) == without_seconds(summaries[1])


def test_a_finished_run_is_left_alone(runs: Runs, reference: Path) -> None:
    def state() -> dict[Path, tuple[int, int]]:
        files = (p for p in reference.rglob("*") if p.is_file() and p.name not in ("config.yaml", ".lock"))
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}

    before = state()
    steps, printed = runs.run(command(reference))
    assert state() == before
    assert steps == []
    table = printed[printed.index("KL/token") :]
    first = reference.with_name("printed").read_text()
    assert table == first[first.index("KL/token") :]
    summary = json.loads((reference / "summary.json").read_text())
    for entry in summary["rounds"]:
        for measured in entry["policies"].values():
            assert f"{measured['pass@1']:.3f} ± {measured['pass@1_stderr']:.3f}" in table
