"""A share of the damage suite (`support.damage`) that takes seconds: some files of the smallest run, each damaged."""

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.chain import arguments
from support.damage import DAMAGES, FAULTS, Case, Result, made_by, verdict

FILES = {
    "base/generation_config.json": {"fit": "refused", "report": "not read"},
    "prompts/train.jsonl": {"fit": "refused", "report": "not read"},
    "round-1/rollouts/manifest.json": {"fit": "refused", "report": "not read"},
    "round-1/rollouts/part-00000.parquet": {"fit": "refused", "report": "not read"},
    "round-1/extreme_region/started.json": {"fit": "not read", "report": "not read"},
    "round-1/extreme_region/teacher/tokenizer.json": {"fit": "refused", "report": "not read"},
    "round-1/evaluation/student/samples.parquet": {"fit": "refused"},
    "round-1/distill/metrics/version_0/metrics.csv": {"fit": "not read"},
    "summary.json": {"fit": "repaired"},
}
"""Files, and what is made of them where that does not depend on the damage."""

END = Callable[[str, Path], Result]


@pytest.fixture
def end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> END:
    """Runs a command in this process; gives its end."""
    from erpd_lightning.cli.main import main as cli
    from erpd_lightning.report.command import main as report

    def call(command: str, run_dir: Path) -> Result:
        argv = ["report", str(run_dir)] if command == "report" else arguments(run_dir, command)
        monkeypatch.setattr(sys, "argv", ["erpd_lightning", *argv])
        capsys.readouterr()
        code = 0
        try:
            report(argv[1:]) if command == "report" else cli()
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        output = captured.out + captured.err
        return Result(code, output, made_by(command, run_dir, output) if code == 0 else None)

    return call


@pytest.mark.parametrize(("number", "file"), list(enumerate(FILES)))
def test_a_damaged_file(number: int, file: str, copy: Callable[..., Path], end: END) -> None:
    run_dir = copy()
    damage = DAMAGES[number % len(DAMAGES)]
    original = (run_dir / file).read_bytes()
    for command in ("report", "fit"):
        expected = end(command, run_dir)
        assert expected.code == 0, expected.output
        damage(run_dir / file, random.Random(file))
        result = end(command, run_dir)
        found = verdict(Case("finished", file, damage.__name__, command), run_dir, result, expected, original)
        assert found not in FAULTS, result.output
        assert found == FILES[file].get(command, found), result.output
        (run_dir / file).write_bytes(original)
