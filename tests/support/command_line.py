"""What tests of the command line share: calls of `main`, arguments, and what a run directory holds."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from erpd_lightning.models.policy import policy_fingerprint
from erpd_lightning.pipeline.rounds import STAGES as ALL_STAGES
from support.chain import arguments

STAGES = [stage for stage in ALL_STAGES if stage != "signal_selection"]
"""Those of a run whose signal is given."""


Run = Callable[..., str]


def printed(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Call `main` with arguments in this process; returns what it printed."""
    from erpd_lightning.cli.main import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["erpd_lightning", *map(str, args)])
        capsys.readouterr()
        main()
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], run: Run, *args: object) -> str:
    """Run with arguments that hold a mistake; returns the one line about it, without `error: `."""
    with pytest.raises(SystemExit) as ended:
        run(*args)
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: "), lines
    assert len(lines[0]) < 400, lines
    return lines[0].removeprefix("error: ")


def digests(folder: Path) -> dict[str, str]:
    """Every file below a folder, by content."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def student(run_dir: Path) -> str:
    return policy_fingerprint(run_dir / "round-1" / "distill" / "student")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def with_yaml(path: Path, text: str) -> list[str]:
    """The smallest run with a configuration file over it."""
    return [*arguments(path / "run"), f"--config={write(path / 'more.yaml', text)}"]
