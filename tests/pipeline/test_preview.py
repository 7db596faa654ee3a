"""Candidates for the target, measured the slow way too, and the command that previews a run's budgets."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from erpd_lightning.cli.main import ERPDCLI
from erpd_lightning.data.batching import RolloutTable, replaced
from erpd_lightning.data.prompt_batches import PromptBatch
from erpd_lightning.data.prompts import Prompt
from erpd_lightning.data.samplers import TransformersSampler
from erpd_lightning.data.samplers.tilted import TiltedSampler
from erpd_lightning.data.verifiers import Verifier
from erpd_lightning.objectives.signal import Signal, Term
from erpd_lightning.objectives.tilted_policy import UnreachableBudget
from erpd_lightning.pipeline.signal_search import Candidate, Preview, preview, solve
from support.chain import arguments, parsers_built_once
from support.command_line import Run, digests, printed, refusal
from support.policies import TASK, make_model, token_logps

SIGNAL = Signal([Term("teacher", "unlearned", 1.0, 2.0)])
TEACHER_ITSELF = Candidate("teacher", Signal([Term("teacher", "base", 1.0, 1e6)]), beta=1.0)
SAMPLES = 6
PROMPTS = [[3, 13, 4], [5], [6, 14, 7, 15, 8, 13, 9]]


class Even(Verifier):
    """Rewards responses of an even number of characters; says nothing of those of one."""

    def __call__(self, responses: Any, answers: Any) -> list[float | None]:
        return [None if len(text) == 1 else float(len(text) % 2 == 0) for text in responses]


@pytest.fixture
def models() -> dict[str, Any]:
    return {name: make_model(seed) for seed, name in enumerate(("base", "teacher", "unlearned"))}


@pytest.fixture
def scores() -> dict[str, torch.Tensor]:
    """Of 200 states, over six entries that hold everything."""
    return {name: (2 * torch.randn(200, 6)).log_softmax(-1) for name in ("base", "teacher", "unlearned")}


def batches(prompts: list[list[int]] = PROMPTS, per_batch: int = 2) -> list[PromptBatch]:
    """Prompts in batches, with a last one that is empty."""
    return [
        PromptBatch(
            index=number,
            prompts=[Prompt("", "") for _ in prompts[first : first + per_batch]],
            prompt_ids=prompts[first : first + per_batch],
            groups=range(first, first + len(prompts[first : first + per_batch])),
            samples=SAMPLES,
            seed=number,
            max_tokens=1000,
            tokenizer=TASK.tokenizer(),
            sampler=TransformersSampler(10),
            verifier=Even(),
        )
        for number, first in enumerate(range(0, len(prompts) + per_batch, per_batch))
    ]


def by_hand(models: dict[str, Any], candidate: Candidate, beta: float) -> dict[str, np.ndarray]:
    """Sums over each prompt's responses, `(prompts,)`, from the probabilities of each prefix by itself."""
    tokenizer = TASK.tokenizer()
    sums: dict[str, list[float]] = {"correct": [], "kl": [], "entropy": [], "tokens": []}
    for batch in batches():
        repeated = [ids for ids in batch.prompt_ids for _ in range(SAMPLES)]
        sampler = TiltedSampler(batch.sampler, candidate.signal, beta)
        for prompt, row in zip(repeated, sampler.sample(models, tokenizer, repeated, batch.seed), strict=True):
            ids = row.response.ids
            with torch.no_grad():
                logps = {name: token_logps(model, prompt, ids).double().numpy() for name, model in models.items()}
            tilted = logps["base"].copy()
            for term in candidate.signal.terms:
                tilted += np.clip(logps[term.numerator] - logps[term.denominator], -term.clip, term.clip) / beta
            target = np.exp(tilted) / np.exp(tilted).sum(axis=1, keepdims=True)
            length = len(tokenizer.decode(ids, skip_special_tokens=True))
            sums["correct"].append(float(length != 1 and length % 2 == 0))
            sums["kl"].append((target * (np.log(target) - logps["base"])).sum())
            sums["entropy"].append(-(target * np.log(target)).sum())
            sums["tokens"].append(len(ids))
    return {name: np.array(values).reshape(-1, SAMPLES).sum(axis=1) for name, values in sums.items()}


def with_stderr(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """A ratio and its standard error by the jackknife over prompts, which for a mean is the usual one."""
    ratio = x.sum() / y.sum()
    residuals = x - ratio * y
    count = len(x)
    return float(ratio), float((count / (count - 1) * (residuals**2).sum()) ** 0.5 / y.sum())


# Candidates


@pytest.mark.parametrize("candidate", [Candidate("tilted", SIGNAL, beta=0.8), TEACHER_ITSELF])
def test_what_is_measured_is_what_was_decoded_from(
    models: dict[str, Any], scores: dict[str, torch.Tensor], candidate: Candidate
) -> None:
    (row,) = preview([candidate], models, scores, batches())
    assert candidate.beta is not None
    sums = by_hand(models, candidate, candidate.beta)
    samples = np.full(len(PROMPTS), SAMPLES)
    assert (row.pass_at_1, row.pass_at_1_stderr) == pytest.approx(with_stderr(sums["correct"], samples))
    assert (row.kl_per_token, row.kl_per_token_stderr) == pytest.approx(
        with_stderr(sums["kl"], sums["tokens"]), rel=1e-4
    )
    assert row.entropy_per_token == pytest.approx(sums["entropy"].sum() / sums["tokens"].sum(), rel=1e-4)
    assert row.mean_length == pytest.approx(sums["tokens"].sum() / samples.sum())
    assert (row.candidate, row.beta, row.samples) == (candidate, candidate.beta, 3 * SAMPLES)
    assert 0.1 < row.pass_at_1 < 0.9
    assert row.kl_per_token > 0.1


def test_the_teacher_is_one_of_the_candidates(models: dict[str, Any], scores: dict[str, torch.Tensor]) -> None:
    """Its KL, measured without any tilting, on the responses that it draws itself."""
    (row,) = preview([TEACHER_ITSELF], models, scores, batches())
    kl = tokens = 0.0
    for batch in batches()[:2]:
        repeated = [ids for ids in batch.prompt_ids for _ in range(SAMPLES)]
        responses = batch.sampler.sample(models["teacher"], batch.tokenizer, repeated, batch.seed)
        for prompt, response in zip(repeated, responses, strict=True):
            with torch.no_grad():
                p, q = (token_logps(models[name], prompt, response.ids).double() for name in ("teacher", "base"))
            kl += float((p.exp() * (p - q)).sum())
            tokens += len(response.ids)
    assert row.kl_per_token == pytest.approx(kl / tokens, rel=1e-4)
    teacher, base = scores["teacher"].double(), scores["base"].double()
    stored = (teacher.exp() * (teacher - base)).sum(-1).mean()
    assert row.kl_on_stored_states == pytest.approx(float(stored), rel=1e-5)


def test_budgets_are_spent_and_the_order_is_kept(models: dict[str, Any], scores: dict[str, torch.Tensor]) -> None:
    candidates = [Candidate(f"{budget}", SIGNAL, budget) for budget in (0.2, 0.001, 0.05)]
    rows = preview(candidates, models, scores, batches())
    assert [row.candidate for row in rows] == candidates
    assert [row.kl_on_stored_states for row in rows] == pytest.approx([0.2, 0.001, 0.05], rel=1e-3)
    large, small, middle = rows
    assert large.beta < middle.beta < small.beta
    assert small.kl_per_token < middle.kl_per_token < large.kl_per_token


def test_the_same_again(models: dict[str, Any], scores: dict[str, torch.Tensor]) -> None:
    """A row depends on no other candidate and on no random state."""
    candidates = [Candidate("first", SIGNAL, 0.1), TEACHER_ITSELF]
    first = preview(candidates, models, scores, batches())
    torch.manual_seed(123)
    assert preview(candidates[::-1], models, scores, batches()) == first[::-1]


def test_processes_share_the_prompts_and_agree(models: dict[str, Any], scores: dict[str, torch.Tensor]) -> None:
    """Each decodes for its own prompts; the beta is that of the first, whatever another one solved."""
    candidates = [Candidate("first", SIGNAL, 0.1), TEACHER_ITSELF]
    alone = preview(candidates, models, scores, batches())
    shares = [batches()[:1], batches()[1:]]
    told: list[list[Any]] = [[], []]

    def share(rank: int) -> list[Preview]:
        def gather(value: Any) -> list[Any]:
            told[rank].append(value)
            if rank == 0:
                return [value, {}]
            return [told[0][len(told[1]) - 1], value]

        differently = {name: (0.9 * values).log_softmax(-1) for name, values in scores.items()}
        return preview(candidates, models, differently if rank else scores, shares[rank], gather)

    share(0)
    assert share(1) == alone
    assert [[*sums] for sums in told[0][1:]] == [[0], [0]]
    assert [[*sums] for sums in told[1][1:]] == [[1], [1]]


def test_an_unreachable_budget_is_told_before_anything_is_sampled(scores: dict[str, torch.Tensor]) -> None:
    candidates = [Candidate("first", SIGNAL, 0.1), Candidate("second", SIGNAL, 50.0)]
    with pytest.raises(UnreachableBudget, match="budget of 50 nats"):
        preview(candidates, {}, scores, batches())


def test_what_is_given_a_beta_and_what_is_given_its_kl_is_the_same_target(scores: dict[str, torch.Tensor]) -> None:
    given = solve(Candidate("given", SIGNAL, beta=0.7), scores)
    assert solve(Candidate("solved", SIGNAL, given.kl), scores).beta == pytest.approx(0.7, rel=1e-3)


def test_a_single_prompt_has_no_standard_error(models: dict[str, Any], scores: dict[str, torch.Tensor]) -> None:
    (row,) = preview([TEACHER_ITSELF], models, scores, batches([[5]]))
    assert np.isnan([row.pass_at_1_stderr, row.kl_per_token_stderr]).all()
    assert np.isfinite([row.pass_at_1, row.kl_per_token]).all()


@pytest.mark.parametrize(
    "given", [{}, {"budget": 0.1, "beta": 1.0}, {"budget": 0.0}, {"beta": -1.0}, {"budget": float("inf")}]
)
def test_a_candidate_has_a_budget_or_a_beta(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="odd"):
        Candidate("odd", SIGNAL, **given)


class Weighted(Verifier):
    """Two rewards together: 0.7999999999999999."""

    def __call__(self, responses: Any, answers: Any) -> list[float | None]:
        return [0.7 + 0.1 for _ in responses]


def test_a_reward_counts_as_it_does_in_a_store(models: dict[str, Any], scores: dict[str, torch.Tensor]) -> None:
    """Stores hold float32, in which 0.7 + 0.1 is 0.8."""
    graded = [replaced(batch, verifier=Weighted(), correct_threshold=0.8) for batch in batches()]
    (row,) = preview([TEACHER_ITSELF], models, scores, graded)
    stored = RolloutTable.from_arrow(graded[0].respond(models["base"])).rewards
    assert row.pass_at_1 == float((stored >= 0.8).double().mean()) == 1


# The command


@pytest.fixture(autouse=True, scope="module")
def _parsers_are_built_once() -> Iterator[None]:
    with parsers_built_once():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["erpd_lightning"])
        ERPDCLI(args=arguments(path, rounds=2))
    shutil.rmtree(path / "round-2" / "scoring")  # The second round is at an earlier stage.
    return path


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def command(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Previews the copied run with more arguments, and returns what it printed."""
    return partial(printed, capsys, "preview", f"--config={run_dir / 'config.yaml'}", f"--run_dir={run_dir}")


@pytest.fixture
def refused(command: Run, capsys: pytest.CaptureFixture[str]) -> Run:
    """The one line about a mistake, with exit code 2."""
    return partial(refusal, capsys, command)


def test_a_preview_adds_two_files_and_changes_nothing(command: Run, run_dir: Path) -> None:
    before = digests(run_dir)
    out = command()
    made = digests(run_dir)
    assert {name: made[name] for name in before} == before
    assert set(made) - set(before) == {"round-1/preview.json", "round-1/preview.png"}

    content = json.loads((run_dir / "round-1" / "preview.json").read_text())
    assert (content["round"], content["prompts"], content["samples_per_prompt"]) == (1, 8, 2)
    assert content["signal"] == [{"numerator": "teacher", "denominator": "unlearned", "weight": 1.0, "clip": 3.0}]
    rows = content["previews"]
    assert [row["budget"] for row in rows] == pytest.approx([0.005, 0.01, 0.015, 0.02])
    for row in rows:
        assert row["kl_on_stored_states"] == pytest.approx(row["budget"], rel=1e-3)
        assert row["samples"] == 16
        assert 0 < row["kl_per_token"] < 0.1
    measured = json.loads((run_dir / "summary.json").read_text())["rounds"][0]["policies"]
    assert content["policies"] == measured

    image = (run_dir / "round-1" / "preview.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    header = next(line for line in out.splitlines() if "KL on stored states" in line)
    table = out[out.index(header) :].splitlines()
    assert [line.split()[0] for line in table[2:10]] == ["teacher/unlearned"] * 4 + list(measured)
    assert str(run_dir / "round-1" / "preview.png") in table[10]

    # The same again, from the same seeds, and another with another.
    command()
    assert digests(run_dir) == made
    command("--seed_everything=1")
    assert json.loads((run_dir / "round-1" / "preview.json").read_text())["previews"] != rows


def test_budgets_verifier_and_precision_are_the_users(command: Run, run_dir: Path) -> None:
    out = command(
        "--budgets=[0.03]",
        "--round=1",
        "--data.validation_samples=3",
        "--data.verifier=support.verifiers.Constant",
        "--trainer.precision=bf16-true",
    )
    content = json.loads((run_dir / "round-1" / "preview.json").read_text())
    (row,) = content["previews"]
    assert (row["budget"], row["pass@1"], row["samples"]) == (0.03, 1.0, 24)
    assert "1.000 ± 0.000" in out


def test_around_a_given_beta(command: Run, run_dir: Path) -> None:
    command("--distill.kl_budget=null", "--distill.beta=4.0")
    rows = json.loads((run_dir / "round-1" / "preview.json").read_text())["previews"]
    assert rows[1]["beta"] == pytest.approx(4.0, rel=1e-3)
    assert rows[2]["budget"] == pytest.approx(3 * rows[0]["budget"])


def test_all_that_a_signal_is_to_be_chosen_from(command: Run, run_dir: Path) -> None:
    auto = '{"class_path": "erpd_lightning.AutoSignal", "init_args": {"prompts": 4}}'
    command(f"--distill.signal={auto}", "--budgets=[0.005, 0.02]")
    rows = json.loads((run_dir / "round-1" / "preview.json").read_text())["previews"]
    kinds = [(row["candidate"].partition(",")[0], row["budget"]) for row in rows]
    assert len(set(kinds)) == len(kinds)
    for budget in (0.005, 0.0025, 0.02, 0.01):
        assert {("teacher/unlearned", budget), ("teacher/base", budget)} <= set(kinds)


def test_before_any_student_is_there(command: Run, run_dir: Path) -> None:
    for stage in ("distill", "evaluation"):
        shutil.rmtree(run_dir / "round-1" / stage)
    command("--budgets=[0.01]")
    assert json.loads((run_dir / "round-1" / "preview.json").read_text())["policies"] == {}


def test_without_matplotlib_there_is_still_the_table(
    command: Run, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = command("--budgets=[0.01]").splitlines()
    assert any(line.split()[:2] == ["teacher/unlearned", "0.01"] for line in out)
    assert "matplotlib" in out[-1]
    assert "erpd-lightning[report]" in out[-1]
    assert (run_dir / "round-1" / "preview.json").is_file()
    assert not (run_dir / "round-1" / "preview.png").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--budgets=[0.01, 0]"], r"budgets is \[0\.01, 0\]: .* positive number"),
        (["--budgets=[-1]"], r"budgets is \[-1\]: .* positive number"),
        (["--budgets=[]"], r"budgets is \[\]: at least one"),
        (["--budgets=[.nan]"], r"budgets is \[nan\]: .* positive number"),
        (["--budgets=[40]"], r"budgets: a KL budget of 40 nats per token is out of reach"),
        (["--budgets=much"], r"budgets: expected"),
        (["--round=3"], r"round is 3: it must lie between 1 and rounds \(2\)"),
        (["--round=2"], r"round 2 of .*run has no finished stage scoring.*: run fit --stage scoring"),
        (["--data.max_validation_prompts=0"], r"data\.max_validation_prompts is 0"),
        (
            ["--data.sampler.temperature=0.5"],
            r"data\.sampler\.temperature is 0\.5, but the stored rollouts were drawn at 1: .* set it to 1",
        ),
    ],
)
def test_mistakes(refused: Run, run_dir: Path, given: list[str], message: str) -> None:
    before = digests(run_dir)
    assert re.match(message, refused(*given))
    assert digests(run_dir) == before


def test_a_run_that_has_nothing_to_preview(refused: Run, run_dir: Path, tmp_path: Path) -> None:
    assert "no round of" in refused(f"--run_dir={tmp_path / 'none'}")
    assert not (tmp_path / "none").exists()
    shutil.rmtree(run_dir / "round-1" / "scoring" / "unlearned")
    assert "uses the policies unlearned, which are not scored" in refused()


def test_policies_that_changed_since_they_were_scored(refused: Run, run_dir: Path) -> None:
    teacher = run_dir / "round-1" / "extreme_region" / "teacher"
    shutil.rmtree(teacher)
    shutil.copytree(run_dir / "base", teacher)
    assert refused().startswith(f"{teacher} was altered or truncated")
    shutil.rmtree(teacher)
    assert "teacher" in refused()
