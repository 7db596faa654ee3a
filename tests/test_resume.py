"""Killed with SIGKILL wherever it hurts and started again with the same command, a run ends as if nothing had happened.

Each case of a stage starts from a finished run whose later stages are taken away, is killed again and again at the
points listed, and must end up with the very files that the uninterrupted run made. What comes before a stage is the
same by the cases before; a last test kills one whole run of two rounds.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from small import arguments

ROOT = Path(__file__).parents[1]

STAGES = {
    "base": "prepare",
    "rollouts": "round-1/rollouts",
    "extreme_region": "round-1/extreme_region",
    "unlearned": "round-1/unlearned",
    "signal": "round-1/signal",
    "distill": "round-1/distill",
    "evaluation": "round-1/evaluation",
}
"""The stages of the first round in their order, and where they lie."""

OVERRIDES = {
    "rounds": 2,
    "data.batch_size": 12,
    "data.sampler.batch_size": 32,  # four parts in a store of rollouts
    "data.max_tokens": 96,  # two micro-batches or more in a step
    "distill_trainer": "{max_epochs: 2, val_check_interval: 0.5}",  # beta is corrected in the middle of epochs too
}


@dataclass(frozen=True)
class Kill:
    """Where a run is killed, as `fork_server` takes it.

    Attributes:
        what: Name of an audit event or, with a colon, of a method.
        path: Pattern of the event's file.
        count: Which of the events or calls it is.
        after: Kill right after the event instead of right before.
        trains: Whether the next run goes on in the middle of training, from a checkpoint.
    """

    what: str
    path: str = ""
    count: int = 1
    after: bool = False
    trains: bool = False

    def spec(self) -> dict[str, Any]:
        name = "call" if ":" in self.what else "event"
        return {name: self.what, "path": self.path, "count": self.count, "after": self.after}


MODULE = "erpd_lightning.policy_module:PolicyModule"


def written(path: str, count: int = 1, trains: bool = False) -> Kill:
    """Right before a file appears under its name: all of its content lies beside it."""
    return Kill("os.rename", f"{path}$", count, trains=trains)


def after(kill: Kill) -> Kill:
    """Right after instead."""
    return replace(kill, after=True)


CHECKPOINT = r"step=\d+\.ckpt"

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
        Kill(f"{MODULE}.evaluate", trains=True),
        Kill(f"{MODULE}.export"),
        Kill("open", r"teacher\.partial/config\.json"),
        after(written("extreme_region/teacher")),
    ],
    "unlearned": [
        written(CHECKPOINT + r"\.partial"),
    ],
    "signal": [
        written(r"signal/base/part-00001\.parquet"),
        written("signal/teacher/manifest.json"),
    ],
    "distill": [
        Kill(f"{MODULE}.training_step", count=8, trains=True),
        Kill(f"{MODULE}.evaluate", count=2, trains=True),
        Kill("erpd_lightning.distill:DistillModule.on_validation_epoch_end", count=2, trains=True),
        after(written(CHECKPOINT, count=2, trains=True)),
        Kill(f"{MODULE}.export"),
    ],
    "evaluation": [
        Kill(f"{MODULE}.evaluate"),
        written("evaluation/teacher/stage.json"),
        after(written("evaluation/teacher/stage.json")),
        Kill(f"{MODULE}.evaluate", count=2),
    ],
}
"""For each stage where it is killed, in this order, before it is let be."""


class Runs:
    """Runs of the command line in children of one process that has imported everything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = os.pathsep.join([str(ROOT), *sys.path])
        self.server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "fork_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    def run(self, run_dir: Path, kill: Kill | None = None) -> tuple[list[int], str]:
        """The optimiser step of each micro-batch that was trained, and what was printed."""
        steps, output = self.folder / "steps", self.folder / "output"
        steps.write_text("")
        output.write_text("")
        case = {
            "argv": arguments(run_dir, **OVERRIDES),
            "steps": str(steps),
            "output": str(output),
            "kill": None if kill is None else kill.spec(),
        }
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        print(json.dumps(case), file=self.server.stdin, flush=True)
        code = int(self.server.stdout.readline())
        printed = output.read_text()
        assert code == (0 if kill is None else -signal.SIGKILL), f"{kill}: exit code {code}\n{printed}"
        return [int(step) for step in steps.read_text().split()], printed

    def close(self) -> None:
        """The server ends with its input."""
        assert self.server.stdin is not None
        self.server.stdin.close()
        assert self.server.wait(30) == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    server = Runs(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def reference(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted; what it printed lies beside it."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    _, printed = runs.run(run_dir)
    run_dir.with_name("printed").write_text(printed)
    return run_dir


def contents(run_dir: Path) -> dict[str, str]:
    """What a run has made: digests of its files by name, records without the time that they took.

    Left out are checkpoints and logs, which no one reads once a stage is done, the configuration, which names the
    run directory, and what a killed writer leaves under a temporary name.
    """
    made = {}
    for path in sorted(run_dir.rglob("*")):
        name = str(path.relative_to(run_dir))
        if not path.is_file() or re.search(r"/(checkpoints|metrics)/|config\.yaml$|/\.[^/]*\.tmp$", f"/{name}"):
            continue
        content = path.read_bytes()
        if path.name in ("stage.json", "summary.json"):
            content = json.dumps(without_seconds(json.loads(content))).encode()
        made[name] = hashlib.sha256(content).hexdigest()
    return made


def without_seconds(record: Any) -> Any:
    """The same without the time that it took."""
    if isinstance(record, list):
        return [without_seconds(entry) for entry in record]
    if isinstance(record, dict):
        return {key: without_seconds(v) for key, v in record.items() if key not in ("seconds", "cpu_seconds")}
    return record


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
def test_a_stage_killed_at_any_point_ends_the_same(
    stage: str, runs: Runs, reference: Path, tmp_path: Path
) -> None:
    run_dir = before(stage, reference, tmp_path / "run")
    record = rf"{STAGES[stage]}/(student/)?stage\.json"
    resumed, kept = None, {}
    for kill in [*KILLS[stage], written(record), after(written(record))]:
        steps, _ = runs.run(run_dir, kill)
        if resumed is not None:
            assert steps[0] == resumed, f"began with step {steps[0]}, not with the checkpoint's, before {kill}"
        resumed = saved_steps(run_dir, stage) if kill.trains else None
        assert resumed != 0, f"{kill} came before any checkpoint"
        if stage in ("rollouts", "signal"):
            assert kept.items() <= parts(run_dir, stage).items(), f"parts were made again before {kill}"
            kept = parts(run_dir, stage)
    later = tuple(follows(stage))
    expected = {name: digest for name, digest in contents(reference).items() if not name.startswith(later)}
    assert contents(run_dir) == expected


def test_two_rounds_killed_between_and_within_end_the_same(runs: Runs, reference: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    runs.run(run_dir, written("round-1/evaluation/student/stage.json"))
    runs.run(run_dir, written("summary.json"))
    runs.run(run_dir, written("round-2/rollouts/started.json"))
    runs.run(run_dir, written("round-2/distill/checkpoints/" + CHECKPOINT))
    runs.run(run_dir, written("summary.json", count=2))
    assert "round-2" not in (run_dir / "summary.json").read_text()
    _, printed = runs.run(run_dir)
    assert "[round 2/2] evaluation" in printed
    assert contents(run_dir) == contents(reference)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (run_dir, reference)]
    assert without_seconds(summaries[0]) == without_seconds(summaries[1])


def test_a_finished_run_is_left_alone(runs: Runs, reference: Path) -> None:
    def state() -> dict[Path, tuple[int, int]]:
        files = (path for path in reference.rglob("*") if path.is_file() and path.name != "config.yaml")
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}

    before = state()
    steps, printed = runs.run(reference)
    assert state() == before
    assert steps == []
    table = printed[printed.index("KL/token") :]
    first = reference.with_name("printed").read_text()
    assert table == first[first.index("KL/token") :]
    summary = json.loads((reference / "summary.json").read_text())
    for entry in summary["rounds"]:
        for measured in entry["policies"].values():
            assert f"{measured['pass@1']:.3f} ± {measured['pass@1_stderr']:.3f}" in table
