"""The report on runs: what it reads, what it computes, what the page holds, and how it ends when something is wrong."""

import base64
import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.axes
import numpy as np
import pytest
from PIL import Image

from erpd_lightning.__main__ import main
from erpd_lightning.report import command, measures, page, plots
from erpd_lightning.report.measures import Estimate, gain, kind_of, kl_by_kind, kl_by_position, per_point, saved
from erpd_lightning.report.plots import DARK, LIGHT, accuracy_of_round, accuracy_of_runs
from erpd_lightning.report.read import read_log, read_run, read_runs, run_names
from erpd_lightning.text import visible
from support.made_run import RESPONSES, make_run, measured, sample, write_log, write_stage

ROOT = Path(__file__).parents[2]

EMPTY = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


class Reader(HTMLParser):
    """What a page holds; every element that is opened must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not painted, which takes most of the time."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, format="png")
    monkeypatch.setattr(plots, "_smaller", lambda figure: file.getvalue())


def read_page(*runs: Path) -> Reader:
    return Reader(page.page(read_runs(runs)))


# Reading.


def test_names_are_as_short_as_they_can_be() -> None:
    assert run_names([Path("/a/erpd/seed-0"), Path("/a/grpo/seed-0")]) == ["erpd/seed-0", "grpo/seed-0"]
    assert run_names([Path("/a/erpd/seed-0")]) == ["seed-0"]


def test_a_run_is_read(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", rounds=2), "it")
    assert (run.name, run.seed, run.wanted, [entry.number for entry in run.rounds]) == ("it", 7, 2, [1, 2])
    last = run.rounds[1]
    assert list(last.policies) == ["base", "teacher", "unlearned", "student"]
    assert last.policies["student"]["pass@1"] == pytest.approx(0.7)
    assert (last.budget, last.rollouts, last.base) == (0.05, 800, "b" * 64)
    assert last.seconds == 20.0  # as the summary says
    assert list(last.logs) == ["teacher", "unlearned", "student"]
    assert last.logs["teacher"]["val/kl_per_token"] == {1: 0.1, 2: 0.2}


def test_records_tell_what_the_summary_does_not_yet(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", rounds=2)
    whole = read_run(path, "it")
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps({"rounds": summary["rounds"][:1]}))
    found = read_run(path, "it")
    assert found.rounds[0] == whole.rounds[0]
    assert found.rounds[1].seconds == 8 * 2.5
    for name in ("policies", "budget", "rollouts", "logs", "samples"):
        assert getattr(found.rounds[1], name) == getattr(whole.rounds[1], name), name


def test_further_teachers_come_before_the_student(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    folder = path / "round-1"
    write_stage(folder / "evaluation" / "squared", "evaluation", 1, measured(0.3, 0.2))
    write_stage(folder / "teachers" / "squared", "teachers.squared", 1, {})
    write_log(folder / "teachers" / "squared")
    (path / "summary.json").unlink()
    (entry,) = read_run(path, "it").rounds
    assert list(entry.policies) == ["base", "teacher", "unlearned", "squared", "student"]
    assert list(entry.logs) == ["teacher", "unlearned", "squared", "student"]


def test_a_method_of_one_stage_trains_the_student(tmp_path: Path) -> None:
    (entry,) = read_run(make_run(tmp_path / "run", policies=("base", "student")), "it").rounds
    assert list(entry.logs) == ["student"]
    assert entry.budget is None


def test_a_resumed_stage_counts_each_step_once(tmp_path: Path) -> None:
    """The later attempt wins where both logged a step; `version_10` is later than `version_9`."""
    header = "epoch,step,train/loss,val/pass@1"
    write_log(tmp_path, [(0, 0, 10.0, ""), (0, 1, 11.0, ""), (0, 1, "", 0.1), (0, 2, 12.0, "")], 0, header)
    write_log(tmp_path, [(0, 3, 33.0, ""), (0, 2, 32.0, "")], 10, header)
    write_log(tmp_path, [(0, 1, 21.0, ""), (0, 2, 22.0, ""), (0, 3, 23.0, "")], 9, "epoch,step,train/loss,val/other")
    log = read_log(tmp_path)
    assert list(log["train/loss"].items()) == [(0, 10.0), (1, 21.0), (2, 32.0), (3, 33.0)]
    assert log["val/pass@1"] == {1: 0.1}
    assert "val/other" not in log
    assert "epoch" not in log


def test_a_log_that_has_only_begun_is_empty(tmp_path: Path) -> None:
    write_log(tmp_path).write_text("")
    assert read_log(tmp_path) == {}


# Computing.


def stderr_over_prompts(sums: Sequence[float], counts: Sequence[int]) -> float:
    """Of a ratio of sums, by the standard deviation of its linearised residuals."""
    x, n = np.array(sums), np.array(counts)
    return float(np.std(x - n * x.sum() / n.sum(), ddof=1) * len(x) ** 0.5 / n.sum())


def test_kl_by_position() -> None:
    bins = kl_by_position(RESPONSES)
    assert [(b.first, b.last, b.responses) for b in bins] == [(1, 1, 4), (2, 2, 3), (3, 3, 2), (4, 4, 2)]
    assert [b.kl.value for b in bins] == pytest.approx([1.2 / 4, 3.2 / 3, 0.3, 0.0])
    expected = [
        stderr_over_prompts([0.4, 0.8], [2, 2]),
        stderr_over_prompts([0.2, 3.0], [2, 1]),
        stderr_over_prompts([0.5, 0.1], [1, 1]),
        0.0,
    ]
    assert [b.kl.stderr for b in bins] == pytest.approx(expected)


def test_long_responses_are_binned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "MOST_BINS", 2)
    rows = [sample(0, 0, "abcde", [1.0, 2.0, 3.0, 4.0, 8.0]), sample(1, 0, "ab", [3.0, 2.0])]
    bins = kl_by_position(rows)
    assert [(b.first, b.last, b.responses) for b in bins] == [(1, 3, 2), (4, 5, 1)]
    assert [b.kl.value for b in bins] == pytest.approx([11 / 5, 6.0])
    assert math.isnan(bins[1].kl.stderr)  # A single prompt tells none.
    assert kl_by_position([]) == []


def test_kl_by_kind() -> None:
    kinds = {kind.name: kind for kind in kl_by_kind(RESPONSES)}
    assert list(kinds) == ["digits", "letters", "punctuation, symbols", "whitespace", "special"]
    assert {name: kind.tokens for name, kind in kinds.items()} == {
        "digits": 5,
        "letters": 1,
        "punctuation, symbols": 1,
        "whitespace": 1,
        "special": 3,
    }
    assert kinds["digits"].kl.value == pytest.approx(1.7 / 5)
    assert kinds["digits"].kl.stderr == pytest.approx(stderr_over_prompts([0.9, 0.8], [3, 2]))
    assert kinds["whitespace"].share == pytest.approx(3.0 / 5.0)
    assert sum(kind.share for kind in kinds.values()) == pytest.approx(1.0)
    assert all(math.isnan(kind.share) for kind in kl_by_kind([sample(0, 0, "1", [0.0])]))
    assert kl_by_kind([]) == []


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" 42", "digits"),
        ("²", "digits"),
        (" the", "letters"),
        ("né", "letters"),
        ("का", "letters"),
        (" +=", "punctuation, symbols"),
        ("😀", "punctuation, symbols"),
        ("\n\t ", "whitespace"),
        ("a1", "mixed"),
        (").", "punctuation, symbols"),
        ("don't", "mixed"),
        ("\x00", "other"),
        ("\u202e", "other"),
        ("a\N{REPLACEMENT CHARACTER}", "other"),
        ("", "other"),
    ],
)
def test_the_kind_of_a_token(text: str, kind: str) -> None:
    assert kind_of(text, special=False) == kind
    assert kind_of(text, special=True) == "special"


def test_the_share_that_the_student_did_without() -> None:
    found = saved(measured(0.6, 0.05, kl_per_token_stderr=0.005), measured(0.4, 0.4, kl_per_token_stderr=0.02))
    assert found is not None
    ratio = 0.05 / 0.4
    assert found.value == pytest.approx(1 - ratio)
    assert found.stderr == pytest.approx(ratio * ((0.005 / 0.05) ** 2 + (0.02 / 0.4) ** 2) ** 0.5)
    assert saved(measured(0.6, 0.05), measured(0.4, 0.0)) is None


def test_the_price_of_a_point() -> None:
    gained = gain(measured(0.25, 0.0, **{"pass@1_stderr": 0.03}), measured(0.65, 0.05, **{"pass@1_stderr": 0.04}))
    assert (gained.value, gained.stderr) == (pytest.approx(40.0), pytest.approx(5.0))
    price = per_point(4096, gained)
    assert price is not None
    assert (price.value, price.stderr) == (pytest.approx(102.4), pytest.approx(12.8))
    assert per_point(4096, Estimate(9.9, 5.0)) is None
    assert per_point(4096, Estimate(-40.0, 5.0)) is None
    assert per_point(4096, Estimate(math.nan, math.nan)) is None


# Drawing.


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, undrawn: None) -> dict[str, Any]:
    """What is drawn with error bars, by its label."""
    series: dict[str, Any] = {}
    errorbar = matplotlib.axes.Axes.errorbar

    def watched(axes: Any, x: Any, y: Any, **style: Any) -> Any:
        series[style.get("label") or ""] = (list(x), list(y))
        return errorbar(axes, x, y, **style)

    monkeypatch.setattr(matplotlib.axes.Axes, "errorbar", watched)
    return series


def test_each_run_is_a_series(tmp_path: Path, drawn: dict[str, Any]) -> None:
    first = make_run(tmp_path / "ours", rounds=2)
    second = make_run(tmp_path / "_theirs$", policies=("base", "student"))
    accuracy_of_runs(read_runs([first, second]), LIGHT)
    assert drawn["ours"] == ([0.0, 0.1, 0.1], pytest.approx([0.25, 0.65, 0.7]))
    assert drawn[r" _theirs\$"] == ([0.0, 0.1], pytest.approx([0.25, 0.65]))
    assert drawn["teacher"] == ([0.8], pytest.approx([0.45]))
    assert {name for name in drawn if name} == {"ours", r" _theirs\$", "teacher", "unlearned"}


def test_a_round_shows_the_teacher_along_its_epochs(
    tmp_path: Path, drawn: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[Any] = []
    plot = matplotlib.axes.Axes.plot

    def watched(axes: Any, x: Any, y: Any, **style: Any) -> Any:
        lines.append((list(x), list(y), style.get("color")))
        return plot(axes, x, y, **style)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", watched)
    accuracy_of_round(read_run(make_run(tmp_path / "run"), "it").rounds[0], DARK)
    assert lines[0] == ([0.0, 0.1, 0.2], [0.25, 0.5, 0.4], DARK.policies["teacher"])
    assert drawn["student"] == ([0.05], pytest.approx([0.65]))
    assert list(drawn) == ["base", "teacher", "unlearned", "student"]


def test_a_policy_that_diverged_breaks_no_drawing(tmp_path: Path, undrawn: None) -> None:
    broken = [sample(0, 0, ["1", "2"], [math.nan, 0.1]), sample(1, 0, ["1"], [math.nan])]
    path = make_run(tmp_path / "run", responses=broken)
    bad = measured(0.0, math.nan, **{"pass@1_stderr": math.nan, "kl_per_token_to_first": math.inf})
    write_stage(path / "round-1" / "evaluation" / "teacher", "evaluation", 1, bad)
    (path / "summary.json").unlink()
    assert "nan" in read_page(path).text


# The page.


def test_a_page_of_a_run_and_a_baseline(tmp_path: Path, undrawn: None) -> None:
    first = make_run(tmp_path / "ours")
    second = make_run(tmp_path / "theirs", policies=("base", "student"), responses=[])
    found = read_page(first, second)
    assert found.all("title")
    assert found.text.startswith("Report on ours, theirs Report on ours, theirs")
    for part in (
        "ours " + str(first),
        "0.250 ± 0.010",  # pass@1 of the base policy
        "0.0500 ± 0.0010 100.0 ± 2.0 %",  # spent, of the budget
        "87.5 ± 0.4 %",  # that the student did without
        "40.0 ± 1.4 20 ± 1",  # points gained, and rollouts for each
        "teacher: 4 responses to 2 prompts",
        "unlearned digits 5",
        "base of round 1 reward 1, 4 tokens, 0.00 nats",
        "student of round 1 reward 0, 4 tokens, 3.30 nats",
        "No samples.parquet lies beside its evaluations",
    ):
        assert part.replace(" ", "") in found.text.replace(" ", ""), part
    headings = [text for tag, text in re.findall(r"<(h[23])>(.*?)<", page.page(read_runs([first])))]
    assert headings == [
        "Accuracy against KL",
        "Budget asked for and spent",
        "Rollouts per point gained",
        "ours",
        "Accuracy against KL within a round",
        "Entropy and KL over steps",
        "KL by position, round 1",
        "KL by kind of token, round 1",
        "Samples before and after",
    ]


def test_prices_add_up_over_rounds(tmp_path: Path, undrawn: None) -> None:
    """The second round goes from 0.30 to 0.70, both from 0.25."""
    found = read_page(make_run(tmp_path / "run", rounds=2))
    cells = [text for text in found.texts if text.strip()]
    start = cells.index("Rollouts per point gained")
    head = cells.index("rollouts per point so far", start) + 1
    assert cells[head : head + 8] == ["run", "1", "800", "40.0 ± 1.4", "20 ± 1", "800", "40.0 ± 1.4", "20 ± 1"]
    assert cells[head + 8 : head + 16] == ["run", "2", "800", "40.0 ± 1.4", "20 ± 1", "1600", "45.0 ± 1.4", "36 ± 1"]


def test_a_page_holds_everything_itself_in_light_and_dark(tmp_path: Path) -> None:
    found = read_page(make_run(tmp_path / "run"))
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in found.elements}
    images, sources = found.all("img"), found.all("source")
    assert len(images) == len(sources) == 6
    for light, dark in zip(images, sources, strict=True):
        assert len(light["alt"] or "") > 20
        assert dark["media"] == "(prefers-color-scheme: dark)"
        for address, theme in ((light["src"], LIGHT), (dark["srcset"], DARK)):
            assert address is not None
            kind, _, content = address.partition(",")
            assert kind == "data:image/png;base64"
            with Image.open(io.BytesIO(base64.b64decode(content))) as image:
                assert image.size == (720, 540)
                assert "#{:02x}{:02x}{:02x}".format(*image.convert("RGB").getpixel((0, 0))) == theme.background  # type: ignore[misc]
    for _, attributes in found.elements:
        for name in ("src", "srcset", "href", "action", "style"):
            assert (attributes.get(name) or "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)


def test_text_of_others_is_shown_safely(tmp_path: Path, undrawn: None) -> None:
    odd = "<script>alert(1)</script>&amp;\"'\u202e\x1b[31m\x07\ufeff\u2028"
    rows = [sample(0, 0, [odd, "\n", "<eos>"], [0.7, 0.2, 0.0], prompt=odd, answer="</p><b>")]
    path = make_run(tmp_path / "<i>$run", responses=rows)
    text = page.page(read_runs([path]))
    found = Reader(text)
    assert not found.all("script")
    assert not found.all("i")
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e\u2028\ufeff]", text)
    shown = r"""<script>alert(1)</script>&amp;"'\u202e\x1b[31m\x07\ufeff\u2028"""
    assert found.text.count(shown) == 3  # the prompt, and the responses of base and student
    assert "right answer: </p><b>" in found.text
    assert "<i>$run" in found.text
    assert "⏎" in found.text


def test_a_long_response_is_cut(tmp_path: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "SHOWN_TOKENS", 3)
    monkeypatch.setattr(page, "SHOWN_PROMPTS", 1)
    rows = [sample(group, 0, ["xyz"] * 5, [0.1] * 5) for group in range(2)]
    found = read_page(make_run(tmp_path / "run", responses=rows))
    assert "xyzxyzxyz … 2 more tokens" in found.text
    assert "xyzxyzxyzxyz" not in found.text
    assert "prompt 1" not in found.text


@pytest.mark.parametrize("text", ["plain\nüñ 漢字 😀", ""])
def test_what_can_be_seen_stays(text: str) -> None:
    assert visible(text, lines=True) == text


@pytest.mark.parametrize(
    ("without", "expected"),
    [
        ([], "1 of 1 finished"),
        (["summary.json"], "1 of 1 finished"),
        (["summary.json", "round-1/evaluation/student"], "0 of 1 unfinished"),
        (["summary.json", "round-1/evaluation"], "No policy has been evaluated yet."),
        (["summary.json", "round-1/evaluation", "round-1/distill"], "0 of 1 unfinished"),
        (["summary.json", "round-1/evaluation/base", "round-1/rollouts"], "1 of 1 finished"),
        (["summary.json", "round-1/extreme_region/metrics"], "1 of 1 finished"),
        (["summary.json", "round-1/evaluation/teacher/stage.json", "round-1/config.yaml"], "1 of 1 finished"),
        (["round-1"], "No stage has left a metrics.csv"),
        (["summary.json", "round-1"], "0 of 1 unfinished"),
        (["config.yaml"], "1 of 1 finished"),
    ],
)
def test_an_unfinished_run(tmp_path: Path, undrawn: None, without: list[str], expected: str) -> None:
    path = make_run(tmp_path / "run")
    for name in without:
        gone = path / name
        if gone.is_dir():
            shutil.rmtree(gone)
        else:
            gone.unlink(missing_ok=True)
    found = read_page(path)
    assert expected in " ".join(found.texts)
    beside = read_page(make_run(tmp_path / "other", policies=("base", "student"), responses=[]), path)
    assert beside.all("title")
    assert str(path) in beside.text


def test_many_rounds_and_runs_are_left_out_and_it_is_said(
    tmp_path: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "SHOWN_ROUNDS", 2)
    monkeypatch.setattr(page, "DETAILED_RUNS", 1)
    found = read_page(make_run(tmp_path / "a", rounds=3), make_run(tmp_path / "b", base="c" * 64))
    assert "The last 2 of 3 rounds are drawn." in found.text
    assert "Only the first 1 runs are shown in detail, not b." in found.text
    assert "These runs started from different base policies" in found.text
    assert "base of round 1" in found.text
    assert "student of round 3" in found.text


# The command.


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
