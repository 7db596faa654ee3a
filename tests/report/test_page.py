"""The page of a report: what it holds, and that nothing in a run breaks it."""

import base64
import io
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from erpd_lightning.report import page, run_section, sample_section
from erpd_lightning.report.plots import DARK, LIGHT
from erpd_lightning.report.read import read_runs
from erpd_lightning.text import visible
from support.made_run import make_run, measured, sample, skip_painting, write_stage

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
    skip_painting(monkeypatch)


def read_page(*runs: Path) -> Reader:
    return Reader(page.page(read_runs(runs)))


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
    assert "correct answer: </p><b>" in found.text
    assert "<i>$run" in found.text
    assert "⏎" in found.text


def test_a_long_response_is_cut(tmp_path: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_section, "MAX_SHOWN_TOKENS", 3)
    monkeypatch.setattr(sample_section, "MAX_SHOWN_PROMPTS", 1)
    rows = [sample(group, 0, ["xyz"] * 5, [0.1] * 5) for group in range(2)]
    found = read_page(make_run(tmp_path / "run", responses=rows))
    assert "xyzxyzxyz … 2 more tokens" in found.text
    assert "xyzxyzxyzxyz" not in found.text
    assert "prompt 1" not in found.text


def test_a_policy_that_diverged_breaks_no_drawing(tmp_path: Path, undrawn: None) -> None:
    broken = [sample(0, 0, ["1", "2"], [math.nan, 0.1]), sample(1, 0, ["1"], [math.nan])]
    path = make_run(tmp_path / "run", responses=broken)
    bad = measured(0.0, math.nan, **{"pass@1_stderr": math.nan, "kl_per_token_to_first": math.inf})
    write_stage(path / "round-1" / "evaluation" / "teacher", "evaluation", 1, bad)
    (path / "summary.json").unlink()
    assert "nan" in read_page(path).text


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


def test_rounds_and_runs_that_are_left_out_are_named(
    tmp_path: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_section, "MAX_SHOWN_ROUNDS", 2)
    monkeypatch.setattr(page, "MAX_DETAILED_RUNS", 1)
    found = read_page(make_run(tmp_path / "a", rounds=3), make_run(tmp_path / "b", base="c" * 64))
    assert "The last 2 of 3 rounds are drawn." in found.text
    assert "Only the first 1 runs are shown in detail, not b." in found.text
    assert "These runs started from different base policies" in found.text
    assert "base of round 1" in found.text
    assert "student of round 3" in found.text
