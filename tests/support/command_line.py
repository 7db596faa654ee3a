"""What tests of the command line share: a verifier, arguments, and what a run directory holds."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from erpd_lightning.models.policy import policy_fingerprint
from erpd_lightning.pipeline.rounds import STAGES as ALL_STAGES
from support.chain import arguments

ROOT = Path(__file__).parents[2]

STAGES = [stage for stage in ALL_STAGES if stage != "signal_selection"]
"""Those of a run whose signal is given."""


Run = Callable[..., str]


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
