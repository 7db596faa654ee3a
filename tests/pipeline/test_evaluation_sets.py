"""Evaluation sets in a run of two rounds: what is measured of which policies, what is loaded for it, and what stays."""

import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

import erpd_lightning.models.policy
import erpd_lightning.modules.policy_module
from erpd_lightning.cli.main import main
from erpd_lightning.data.evaluation_sets import EvaluationSet
from erpd_lightning.data.samples import read_samples
from erpd_lightning.errors import InvalidArgument
from erpd_lightning.pipeline.evaluation import RoundEvaluation
from erpd_lightning.report.command import main as report
from support.chain import arguments, parsers_built_once
from support.command_line import Run, digests, printed, refusal
from support.policies import write_prompts

SETS: dict[str, dict[str, Any]] = {
    "greedy": {"top_k": 1, "samples": 3},
    "short": {"max_new_tokens": 2, "max_prompts": 3, "temperature": 0.7, "samples": 2},
    "rated": {"top_p": 0.9, "samples": 4, "verifier": {"class_path": "support.verifiers.EvenEnd"}},
}
PROMPTS = [("1+2:", "3"), ("2+2:", "4"), ("4-1:", "3"), ("9-9:", "0"), ("7*2:", "4")]


@pytest.fixture(autouse=True, scope="module")
def _parsers_are_built_once() -> Iterator[None]:
    with parsers_built_once():
        yield


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return partial(printed, capsys)


@pytest.fixture
def refused(run: Run, capsys: pytest.CaptureFixture[str]) -> Run:
    return partial(refusal, capsys, run)


class Made:
    """A run of two rounds of one stage each, and what happened in it."""

    def __init__(self, folder: Path) -> None:
        self.prompts = write_prompts(folder / "set.jsonl", PROMPTS)
        self.folder = folder / "run"
        self.loaded: list[str] = []
        sets = {name: {"prompts": str(self.prompts), **settings} for name, settings in SETS.items()}
        self.args = [
            *arguments(self.folder, rounds=2, last_stage="extreme_region"),
            f"--evaluation.sets={json.dumps(sets)}",
            "--data.max_validation_prompts=3",
        ]
        self.out = self._make()
        self.summary = json.loads((self.folder / "summary.json").read_text())["rounds"]

    def _make(self) -> str:
        """Run it, and note what is loaded in its evaluations."""
        load, evaluate, out = erpd_lightning.models.policy.load_policy, RoundEvaluation.evaluate, StringIO()
        watched: list[bool] = []

        def noting_load(path: Any, *args: Any) -> Any:
            if watched:
                self.loaded.append(str(Path(path).relative_to(self.folder)))
            return load(path, *args)

        def noting_evaluate(*args: Any) -> None:
            watched.append(True)
            evaluate(*args)
            watched.clear()

        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
            patch.setattr(sys, "argv", ["erpd_lightning", *self.args])
            for module in (erpd_lightning.models.policy, erpd_lightning.modules.policy_module):
                patch.setattr(module, "load_policy", noting_load)
            patch.setattr(RoundEvaluation, "evaluate", noting_evaluate)
            main()
        return out.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("sets"))


def test_each_set_is_measured_under_its_own_sampling(made: Made) -> None:
    for entry in made.summary:
        assert list(entry["evaluation_sets"]) == list(SETS)
        for policies in entry["evaluation_sets"].values():
            assert list(policies) == ["base", "student"]
    sets = made.summary[0]["evaluation_sets"]
    assert {row["samples_per_prompt"] for row in sets["greedy"].values()} == {3}
    for row in sets["greedy"].values():
        assert row["distinct"] == pytest.approx(1 / 3)
        assert row["avg@k"] == row["pass@k"] == row["majority@k"]
        assert row["avg@k_stderr"] == pytest.approx(row["pass@k_stderr"])
    for row in sets["short"].values():
        assert (row["prompts"], row["max_new_tokens"], row["temperature"]) == (3, 2, 0.7)
        assert row["truncated"] == 1
    for row in sets["rated"].values():
        assert row["prompts"] == len(PROMPTS)
        assert 0 < row["avg@k"] < row["pass@k"]
        assert not {"majority@k", "kl_per_token", "entropy_per_token", "pass@1"} & row.keys()


def test_the_table_shows_them(made: Made) -> None:
    lines = made.out.splitlines()
    first = lines.index("Round 1, evaluation sets, each under its own sampling:")
    cells = [line.split() for line in lines[first + 3 : first + 9]]
    assert [row[:2] for row in cells] == [[name, policy] for name in SETS for policy in ("base", "student")]
    row = made.summary[0]["evaluation_sets"]["rated"]["student"]
    assert cells[-1][2:5] == [f"{row['avg@k']:.3f}", "±", f"{row['avg@k_stderr']:.3f}"]


def test_validation_is_capped_and_evaluation_is_not(made: Made) -> None:
    assert made.summary[0]["policies"]["student"]["prompts"] == 8
    metrics = next((made.folder / "round-1" / "extreme_region" / "metrics").rglob("metrics.csv")).read_text()
    header, *rows = [line.split(",") for line in metrics.splitlines()]
    shares = [float(row[header.index("val/pass@1")]) for row in rows if row[header.index("val/pass@1")]]
    assert shares
    for share in shares:  # Of three prompts with two responses each.
        assert share * 6 == pytest.approx(round(share * 6))


def test_no_policy_is_evaluated_or_loaded_twice(made: Made) -> None:
    first, second = (f"round-{number}/extreme_region/student" for number in (1, 2))
    # Each once, and to measure the KL the base policies, of which the first is that of the round too.
    assert made.loaded == ["base", first, "base", second, first, "base"]
    one, two = (entry["policies"] for entry in made.summary)
    to_itself = {name: 0.0 for name in one["student"] if name.startswith("kl_") and "_to_" not in name}
    assert len(to_itself) == 4
    assert one["student"]["kl_per_token"] > 0
    assert two["base"] == {**one["student"], **to_itself, "measured_as": "student of round 1"}
    for name in SETS:
        earlier, later = (entry["evaluation_sets"][name] for entry in made.summary)
        assert later["base"] == {**earlier["student"], "measured_as": "student of round 1"}
    samples = [
        read_samples(made.folder / f"round-{number}" / "evaluation" / policy / "samples.parquet")
        for number, policy in ((1, "student"), (2, "base"))
    ]
    assert samples[1] == [{**row, "kls": [0.0] * len(row["kls"])} for row in samples[0]]
    assert torch.tensor([kl for row in samples[0] for kl in row["kls"]]).sum() > 0


def test_what_is_done_stays_and_a_new_set_is_added(made: Made, run: Run) -> None:
    before = digests(made.folder)
    out = run(*made.args)
    assert out.count("evaluation: done already") == 16
    assert digests(made.folder) == before
    sets = json.dumps({"new": {"prompts": str(made.prompts), "samples": 2}})
    out = run(*made.args, f"--evaluation.sets={sets}", "--evaluation.policies=[student]")
    assert out.count("evaluation: done already") == 2
    assert [line for line in out.splitlines() if " evaluation: measuring" in line] == [
        f"[round {number}/2] evaluation: measuring student on new" for number in (1, 2)
    ]
    entry = json.loads((made.folder / "summary.json").read_text())["rounds"][1]
    assert list(entry["policies"]) == ["student"]
    assert list(entry["evaluation_sets"]) == ["new"]
    assert list(entry["evaluation_sets"]["new"]) == ["student"]


def test_another_setting_of_a_set_is_refused(made: Made, refused: Run) -> None:
    sets = json.dumps({"greedy": {"prompts": str(made.prompts), "top_k": 2, "samples": 3}})
    message = refused(*made.args, f"--evaluation.sets={sets}")
    assert message.startswith(f"{made.folder}/round-1/evaluation_sets/greedy/base was made with set.sampler.top_k: 1")
    prompts = write_prompts(made.folder / "other.jsonl", PROMPTS[:-1])
    sets = json.dumps({"greedy": {"prompts": str(prompts), "top_k": 1, "samples": 3}})
    assert "greedy/base was made with set.prompts: " in refused(*made.args, f"--evaluation.sets={sets}")


def test_a_report_shows_the_sets(made: Made, tmp_path: Path, run: Run) -> None:
    run(*made.args)  # The summary is that of all sets again.
    page = tmp_path / "page.html"
    report([str(made.folder), f"--output={page}"])
    assert page.read_text().count('<td class="word">rated</td>') == 4
    (made.folder / "summary.json").unlink()
    unfinished = tmp_path / "unfinished.html"
    report([str(made.folder), f"--output={unfinished}"])
    assert unfinished.read_text().count('<td class="word">rated</td>') == 4
    run(*made.args)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"temperature": 0}, "evaluation.sets.a.temperature is 0: it must be above 0; top_k: 1 is greedy decoding"),
        ({"top_p": 2}, "evaluation.sets.a.top_p is 2.0: it must be above 0 and at most 1"),
        ({"samples": 0}, "evaluation.sets.a.samples is 0: it must be at least 1"),
        ({"top_q": 1}, "top_q"),
        ({"prompts": "none.jsonl"}, "evaluation.sets.a: none.jsonl is missing"),
        ({"max_new_tokens": 99}, "evaluation.sets.a.max_new_tokens is 99: with the 4 tokens of"),
        (
            {"verifier": {"class_path": "ExactMatch", "init_args": {"pattern": "("}}},
            "evaluation.sets.a.verifier.pattern is '(', which is no regular expression",
        ),
    ],
)
def test_mistakes_in_a_set(made: Made, refused: Run, given: dict[str, Any], expected: str) -> None:
    sets = json.dumps({"a": {"prompts": str(made.prompts), **given}})
    assert expected in refused(*made.args, f"--evaluation.sets={sets}")


def test_mistakes_in_names(made: Made, refused: Run) -> None:
    message = refused(*made.args, "--evaluation.policies=[teacher]")
    assert message == "evaluation.policies: no policy is called teacher; there are base, student"
    for name in ("held_out", "../x", ""):
        sets = json.dumps({name: {"prompts": str(made.prompts)}})
        assert "has no name for a set" in refused(*made.args, f"--evaluation.sets={sets}")
    assert "did you mean evaluation.sets?" in refused(*made.args, "--evaluation.setz={}")


def test_values_out_of_range_in_a_library() -> None:
    with pytest.raises(InvalidArgument, match=r"^top_k is -1"):
        EvaluationSet("prompts.jsonl", top_k=-1)
