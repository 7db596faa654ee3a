"""Runs of the command line that are killed where a test says so, and what they leave behind."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

MODULE = "erpd_lightning.modules.training:TrainingModule"
EVALUATION = "erpd_lightning.modules.evaluation:EvaluationModule"
CHECKPOINT = r"step=\d+\.ckpt"


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


def written(path: str, count: int = 1, trains: bool = False) -> Kill:
    """Right before a file appears under its name: all of its content lies beside it."""
    return Kill("os.rename", f"{path}$", count, trains=trains)


def after(kill: Kill) -> Kill:
    """Right after instead."""
    return replace(kill, after=True)


class Runs:
    """Runs of the command line in children of one process that has imported everything.

    Args:
        folder: For what they say of themselves.
        part_tokens: Tokens in a part of a store of scores, so that a small store has several; None for as many as
            there are outside of tests.
    """

    def __init__(self, folder: Path, part_tokens: int | None = None) -> None:
        self.folder = folder
        path = os.pathsep.join([str(ROOT), *sys.path])
        options = [] if part_tokens is None else [part_tokens]
        self.server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "support" / "fork_server.py"), *map(str, options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    def run(self, argv: Sequence[str], kill: Kill | None = None, processes: int = 1) -> tuple[list[int], str]:
        """The optimiser step of each micro-batch that was trained, and what was printed.

        With several processes all of this is about the first; the others die with it.
        """
        steps, output = self.folder / "steps", self.folder / "output"
        steps.write_text("")
        output.write_text("")
        case = {
            "argv": list(argv),
            "processes": processes,
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
