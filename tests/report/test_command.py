"""The command `report`: what it writes and prints, and how it ends when something is wrong."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from erpd_lightning.__main__ import main
from erpd_lightning.report import command
from support.made_run import make_run, skip_painting, write_log, write_stage

ROOT = Path(__file__).parents[2]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_painting(monkeypatch)


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], undrawn: None) -> Callable[..., str]:
    """Runs the command and returns what it printed."""

    def call(*args: object) -> str:
        monkeypatch.setattr(sys, "argv", ["erpd_lightning", "report", *map(str, args)])
        main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def refused(report: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command with a mistake in it, and returns its one line about it."""

    def call(*args: object) -> str:
        with pytest.raises(SystemExit) as ended:
            report(*args)
        lines = capsys.readouterr().err.splitlines()
        assert (ended.value.code, len(lines)) == (2, 1), lines
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return call


TABLE = """\
 run  seed  round   policy         pass@1         KL/token  KL/token to first  of budget  rollouts  rollouts/point
------------------------------------------------------------------------------------------------------------------
ours     7      1     base  0.250 ± 0.010  0.0000 ± 0.0000    0.0000 ± 0.0000
ours     7      1  student  0.650 ± 0.010  0.0500 ± 0.0010    0.1000 ± 0.0020       100%       800              20
ours     7      2  student  0.700 ± 0.010  0.0500 ± 0.0010    0.1000 ± 0.0020       100%      1600              36
   b     7      1     base  0.250 ± 0.010  0.0000 ± 0.0000    0.0000 ± 0.0000
   b     7      1  student  0.650 ± 0.010  0.0500 ± 0.0010    0.1000 ± 0.0020                  800              20
"""


def test_the_command_writes_a_page_and_prints_a_table(tmp_path: Path, report: Callable[..., str]) -> None:
    first = make_run(tmp_path / "ours", rounds=2)
    second = make_run(tmp_path / "b", policies=("base", "student"))
    assert report(first, second) == f"{TABLE}The report lies in {first / 'report.html'}\n"
    text = (first / "report.html").read_text()
    assert text.startswith("<!DOCTYPE html>")
    elsewhere = tmp_path / "new" / "page.html"
    assert report(first, second, "--output", elsewhere).endswith(f"The report lies in {elsewhere}\n")
    assert elsewhere.read_text() == text


def test_the_command_does_not_wait_for_torch(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", policies=("base", "student"), responses=[])
    code = (
        "import sys; from erpd_lightning.__main__ import main; sys.argv[1:] = ['report', sys.argv[1]]; main(); "
        "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (path / "report.html").stat().st_size < 2**21


EVALUATION = "round-1/evaluation/student/stage.json"


def damaged(path: Path, name: str, content: str | None) -> Path:
    """A run with one of its files cut in the middle, or replaced."""
    file = path / name
    text = file.read_text()
    file.write_text(text[: len(text) // 2] if content is None else content)
    return file


@pytest.mark.parametrize("name", ["summary.json", EVALUATION, "round-1/distill/stage.json"])
@pytest.mark.parametrize("content", [None, "", "[]", "{}", "null", '{"rounds": 3}', '{"rounds": [{}]}', "\ud800"])
def test_a_damaged_record(tmp_path: Path, refused: Callable[..., str], name: str, content: str | None) -> None:
    path = make_run(tmp_path / "run")
    if content == "\ud800":
        file = path / name
        file.write_bytes(b"\xff\xfe{}")
    else:
        file = damaged(path, name, content)
    message = refused(path)
    assert message.startswith(f"{file} is damaged")
    assert not (path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", '"pass@1": "0.6"'),
        (EVALUATION, '"pass@1": null'),
        (EVALUATION, '"seed": "x"'),
        ("round-1/distill/stage.json", '"budget": "much"'),
        ("summary.json", '"rollouts": null'),
        ("summary.json", '"budget": [1]'),
    ],
)
def test_a_record_with_an_odd_value(tmp_path: Path, refused: Callable[..., str], name: str, content: str) -> None:
    path = make_run(tmp_path / "run")
    key = content.partition(":")[0]
    text = (path / name).read_text()
    changed = re.sub(f"{re.escape(key)}: [^,}}]+", content, text)
    assert changed != text
    (path / name).write_text(changed)
    assert refused(path).startswith(f"{path / name} is damaged")


def test_a_record_of_another_stage_in_place_of_an_evaluation(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = make_run(tmp_path / "run")
    write_stage(path / "round-1" / "evaluation" / "student", "distill", 1, {"policy": "x"})
    (path / "summary.json").unlink()
    assert "evaluation/student holds no evaluation" in refused(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("epoch,step,train/loss\r\n0,0,1.0\r\n0,1", "line 3 is half-written"),
        ("epoch,step,train/loss\r\n0,0,1.0\r\n0,1\r\n", "line 3 is damaged"),
        ("epoch,step,train/loss\r\n0,0,what\r\n", "line 2 is damaged"),
        ("epoch,step,train/loss\r\n0,,1.0\r\n", "line 2 is damaged"),
        ("epoch,step,train/loss\r\n\r\n0,1,1.0\r\n", "line 2 is damaged"),
        ("epoch,train/loss\r\n0,1.0\r\n", "is damaged: its first line names no column step"),
        ("epoch,st", "is damaged: its first line names no column step"),
        ("epoch,step,train/lo", "line 1 is half-written"),
    ],
)
def test_a_damaged_log(tmp_path: Path, refused: Callable[..., str], content: str, expected: str) -> None:
    path = make_run(tmp_path / "run")
    file = write_log(path / "round-1" / "extreme_region")
    file.write_text(content, newline="")
    message = refused(path)
    assert message.startswith(str(file))
    assert expected in message


def test_bytes_for_a_log_and_for_samples(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = make_run(tmp_path / "run")
    kept = path / "round-1" / "evaluation" / "student" / "samples.parquet"
    kept.write_bytes(kept.read_bytes()[:100])
    assert refused(path).startswith(f"{kept} cannot be read as the samples of an evaluation")
    file = write_log(path / "round-1" / "distill")
    file.write_bytes(b"\xff\xfe\n")
    assert refused(path).startswith(f"{file} is damaged")


def test_mistakes_on_the_command_line(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert refused() == "the following arguments are required: RUN"
    assert refused(tmp_path / "none") == f"{tmp_path / 'none'} is missing: the folder of a run is expected"
    assert refused(path, tmp_path / "file") == f"{tmp_path / 'file'} is missing: the folder of a run is expected"
    assert refused(tmp_path / "empty").startswith(f"{tmp_path / 'empty'} is no run: ")
    assert refused(path, tmp_path / "x" / ".." / "run") == f"{tmp_path / 'x' / '..' / 'run'} is given twice"
    assert refused(path, "--outpu", "x") == "unrecognized arguments: --outpu x"
    assert refused(path, "--output") == "argument --output: expected one argument"
    assert refused(path, "--output", tmp_path) == f"--output {tmp_path} is a folder: the name of a file is expected"
    assert "cannot be written" in refused(path, "--output", tmp_path / "file" / "page.html")
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert "needs matplotlib" in refused(path)
    assert "pip install 'erpd-lightning[report]'" in refused(path)
