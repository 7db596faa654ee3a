"""Runs of the command line that are killed where a test says so, and what they leave behind."""

import hashlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from support.kills import Kill
from support.processes import ENVIRONMENT, ROOT


class Runs:
    """Runs of the command line in children of one process that has imported everything.

    Args:
        folder: For what they say of themselves.
        part_tokens: Tokens in a part of a store of scores, so that a small store has several; None for as many as
            there are outside of tests.
    """

    def __init__(self, folder: Path, part_tokens: int | None = None) -> None:
        self.folder = folder
        options = [] if part_tokens is None else [part_tokens]
        self.server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "support" / "fork_server.py"), *map(str, options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
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
            "kill": None if kill is None else asdict(kill),
        }
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        print(json.dumps(case), file=self.server.stdin, flush=True)
        code = int(self.server.stdout.readline())
        printed = output.read_text()
        assert code == (0 if kill is None else -signal.SIGKILL), f"{kill}: exit code {code}\n{printed}"
        return [int(step) for step in steps.read_text().split()], printed

    def run_killed(self, argv: Sequence[str], kills: Iterable[Kill], processes: int = 1) -> tuple[list[int], str]:
        """The same of a run that is killed at one place after the other, each time started again, and then ends."""
        for kill in kills:
            self.run(argv, kill, processes)
        return self.run(argv, processes=processes)

    def close(self) -> None:
        """The server ends with its input."""
        assert self.server.stdin is not None
        self.server.stdin.close()
        assert self.server.wait(30) == 0


def contents(run_dir: Path) -> dict[str, str]:
    """What a run has made: digests of its files by name, records without the time that they took.

    Left out are checkpoints and logs, which no one reads once a stage is done, the configuration, which names the
    run directory, the lock, and what a killed writer leaves under a temporary name.
    """
    made = {}
    left_out = r"/(checkpoints|metrics)/|config\.yaml$|/\.lock$|/\.[^/]*\.tmp$"
    for path in sorted(run_dir.rglob("*")):
        name = str(path.relative_to(run_dir))
        if not path.is_file() or re.search(left_out, f"/{name}"):
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
