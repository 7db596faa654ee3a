"""What a run of the whole chain leaves and shows."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from erpd_lightning.report.command import main as report
from support.command_line import STAGES, Run, digests


def test_a_run_says_what_it_does_and_what_it_gained(finished: tuple[Path, str]) -> None:
    run_dir, out = finished
    lines = out.splitlines()
    begun = [re.match(r"\[(?:round 1/1|base)\] (\w+): ", line) for line in lines]
    assert [match[1] for match in begun if match] == [*STAGES[:-1], *["evaluation"] * 4]
    rows = [line.split() for line in lines if re.match(r" +1 ", line)]
    assert [row[1] for row in rows] == ["base", "teacher", "unlearned", "student"]
    assert any(line.startswith("Round 1: budget 0.01 nats per token, 0.0") for line in lines)
    assert lines[-1] == f"The student lies in {run_dir / 'round-1' / 'distill' / 'student'}"


def test_a_run_leaves_files_that_others_can_read(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    for name in ("train", "validation"):
        rows = [json.loads(line) for line in (run_dir / "prompts" / f"{name}.jsonl").read_text().splitlines()]
        assert {"prompt", "answer"} == set().union(*rows)
    for path in (run_dir / "base", run_dir / "round-1" / "distill" / "student"):
        AutoModelForCausalLM.from_pretrained(path)
        assert (
            AutoTokenizer.from_pretrained(path).decode(AutoTokenizer.from_pretrained(path)("1+2:").input_ids) == "1+2:"
        )


def test_a_report_on_a_run(finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that the page shows, from what the chain leaves."""
    run_dir, _ = finished
    report([str(run_dir), f"--output={tmp_path / 'page.html'}"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines[2:4]] == ["base", "student"]
    assert lines[-1] == f"The report lies in {tmp_path / 'page.html'}"
    page = (tmp_path / "page.html").read_text()
    for heading in ("KL by position, round 1", "KL by kind of token, round 1", "Samples before and after"):
        assert f"<h3>{heading}</h3>" in page
    assert page.count('<article class="sample">') == 8
    assert "unfinished" not in page
    assert "student: 16 responses to 8 prompts" in page


def test_the_configuration_in_the_run_directory_makes_the_same_run(finished: tuple[Path, str], run: Run) -> None:
    run_dir, _ = finished
    before = digests(run_dir)
    out = run("fit", "--config", run_dir / "config.yaml")
    assert out.count("done already") == 10
    assert digests(run_dir) == before
