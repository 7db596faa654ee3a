"""Which weights a teacher ends with, several teachers in a round, and a signal chosen among candidates."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from erpd_lightning.cli.main import ERPDCLI
from erpd_lightning.data.prompt_batches import PromptBatch
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samplers import TransformersSampler
from erpd_lightning.errors import UserError
from erpd_lightning.modules.extreme_region import ExtremeRegionModule
from erpd_lightning.objectives.signal import AutoSignal, Signal, Term
from erpd_lightning.objectives.tilted_policy import UnreachableBudget, tilted_kl
from erpd_lightning.pipeline.signal_search import Candidate, Preview, candidates_within_budget, choose
from support.chain import arguments
from support.kills import MODULE, Kill, after, written
from support.policies import write_round
from support.runs import Runs, contents
from support.trainers import make_trainer

ACCURACY = [0.1, 0.5, 0.3, 0.5]
HELD_OUT_ACCURACY = [0.3, 0.1, 0.9, 0.0]
"""What is reported: nothing is chosen by it."""

KL = [0.01, 0.05, 0.2, 0.4]


class Scripted(ExtremeRegionModule):
    """What validation finds is written down; the weights are trained as ever."""

    def on_validation_epoch_end(self) -> None:
        step = min(self.trainer.current_epoch, len(KL) - 1)
        self.log("calibration/pass@1", ACCURACY[step])
        self.log("val/pass@1", HELD_OUT_ACCURACY[step])
        self.log("val/kl_per_token", KL[step])

    def evaluate(self, prompts: PromptBatch, metrics: Any) -> None:
        pass


class Weights(Callback):
    """Notes the weights at the end of each epoch."""

    def __init__(self) -> None:
        self.found: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.found.append({name: value.clone() for name, value in module.policy.state_dict().items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, rollouts and prompts."""
    return write_round(tmp_path_factory.mktemp("data"))


def train(
    folder: Path,
    validate: bool = True,
    epochs: int = 4,
    prompts_per_round: int | None = 1,
    trainer: Mapping[str, Any] = MappingProxyType({}),
    **settings: Any,
) -> tuple[Scripted, Weights]:
    training = folder / "training.jsonl"
    training.write_text("".join(json.dumps({"prompt": f"{n}+70=", "answer": f"{n + 70}"}) + "\n" for n in range(3)))
    data = RolloutDataModule(
        folder / "rollouts",
        tokenizer=folder / "base",
        prompts=training,
        prompts_per_round=prompts_per_round,
        validation_prompts=folder / "prompts.jsonl" if validate else None,
        batch_size=8,
        sampler=TransformersSampler(4),
    )
    module, weights = Scripted(folder / "base", learning_rate=0.01, warmup_steps=0, **settings), Weights()
    make_trainer(weights, max_epochs=epochs, **trainer).fit(module, datamodule=data)
    return module, weights


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(("keep", "sign", "epoch"), [("last", 1, 3), ("best", 1, 1), ("best", -1, 0)])
def test_the_weights_that_a_teacher_ends_with(folder: Path, keep: Any, sign: int, epoch: int) -> None:
    module, weights = train(folder, keep=keep, sign=sign)
    ends = [same(module.policy.state_dict(), found) for found in weights.found]
    assert ends == [number == epoch for number in range(4)]


@pytest.mark.parametrize(("threshold", "epochs"), [(0.05, 2), (0.06, 3), (0.4, 4), (9.0, 4)])
def test_a_teacher_stops_where_its_kl_exceeds_a_threshold(folder: Path, threshold: float, epochs: int) -> None:
    _, weights = train(folder, stop_at_kl=threshold)
    assert len(weights.found) == epochs


@pytest.mark.parametrize("choice", [{"keep": "best"}, {"stop_at_kl": 0.1}])
@pytest.mark.parametrize(
    ("validate", "trainer"), [(False, {}), (True, {"limit_val_batches": 0}), (True, {"check_val_every_n_epoch": 2})]
)
def test_what_is_chosen_by_nothing(
    folder: Path, validate: bool, trainer: dict[str, Any], choice: dict[str, Any]
) -> None:
    """Told before anything is trained, which would go on to its end."""
    (name,) = choice
    with pytest.raises(UserError, match=f"^{name} is {choice[name]}, but nothing would be validated: it takes"):
        train(folder, validate, epochs=1, trainer=trainer, **choice)


def test_no_weights_are_chosen_on_what_is_reported(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^keep is best, but no training prompts are left outside the round"):
        train(folder, keep="best", epochs=1, prompts_per_round=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": "first"}, "^keep is 'first': it must be last or best"),
        ({"stop_at_kl": 0.0}, "^stop_at_kl is 0.0"),
        ({"stop_at_kl": 0.1, "references": {}}, "^stop_at_kl needs the reference `base`"),
    ],
)
def test_choices_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ExtremeRegionModule("p", **settings)


# Candidates


def test_the_candidates_of_a_signal_to_choose() -> None:
    auto = AutoSignal(teachers=["a", "b"], denominators=["base", "u"], clips=[1.0, 3.0], shares=[1.0, 0.5])
    found = auto.candidates()
    assert len(found) == 2 * 2 * 2 * 2 + 2
    assert len({name for name, _, _ in found}) == len(found)
    assert auto.policies == ["a", "b", "base", "u"]
    assert [share for _, _, share in found[:4]] == [1.0, 0.5, 1.0, 0.5]
    assert [vars(signal.terms[0]) for _, signal, _ in found[-2:]] == [
        {"numerator": name, "denominator": "base", "weight": 1.0, "clip": 1e3} for name in ("a", "b")
    ]
    with pytest.raises(ValueError, match="an AutoSignal has no values"):
        auto({})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shares": [0.0]}, r"shares is \[0.0\]"),
        ({"shares": [1.5]}, r"shares is \[1.5\]"),
        ({"prompts": 0}, r"prompts \(0\) and samples \(4\)"),
        ({"teachers": []}, "at least one term"),
        ({"clips": [0.0]}, "the clip of a term is 0.0"),
        ({"denominators": ["teacher"]}, "numerator and denominator of a term are both 'teacher'"),
    ],
)
def test_a_choice_among_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoSignal(**settings)


def some_scores() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    names = ("base", "far", "near", "unlearned")
    scores = {name: (2 * torch.randn(50, 6)).log_softmax(-1) for name in names}
    scores["near"] = (scores["base"] + 0.1 * torch.randn(50, 6)).log_softmax(-1)
    return {**scores, "same": scores["base"]}


def test_candidates_within_the_budget() -> None:
    scores = some_scores()
    found = candidates_within_budget(AutoSignal(teachers=["far", "near", "same"], shares=[0.5]), 0.05, scores)
    names = [candidate.name for candidate in found]
    assert [name.split(",")[0] for name in names] == [
        *("far/unlearned", "far/base", "near/unlearned", "near/base", "same/unlearned"),
        *("near", "same"),
    ]
    # same/base has nothing to spend, far itself spends too much.
    assert [candidate.budget for candidate in found] == [0.025] * 5 + [None] * 2
    far = float(tilted_kl(scores["base"], scores["far"] - scores["base"], 1.0).mean())
    assert far > 0.05
    with pytest.raises(UnreachableBudget, match="no candidate of the signal"):
        candidates_within_budget(AutoSignal(teachers=["same"], denominators=["base"], themselves=[]), 0.05, scores)


def row(name: str, *correct: float) -> Preview:
    """What a candidate showed that got so many of four responses to each prompt correct."""
    candidate = Candidate(name, Signal([Term()]), budget=0.1)
    accuracy = sum(correct) / len(correct) / 4
    return Preview(candidate, 1.0, 0.1, accuracy, 0.1, 0.1, 0.1, 0.5, 9.0, 16, correct, (4.0,) * len(correct))


def test_the_first_that_is_hardly_worse_than_the_best_is_chosen() -> None:
    """Behind the best by 1, 1, 1, 1 of 4: surely; by 2, -1, 2, -1: by 2 +- sqrt(4 / 3 * 9) in all, hardly."""
    best, surely, hardly = row("best", 3, 2, 3, 2), row("surely", 2, 1, 2, 1), row("hardly", 1, 3, 1, 3)
    assert choose([surely, best, hardly]).candidate.name == "best"
    assert choose([surely, hardly, best]).candidate.name == "hardly"
    assert choose([row("same", 3, 2, 3, 2), best]).candidate.name == "same"
    assert choose([row("one prompt", 1), row("correct", 2)]).candidate.name == "correct"


# The chain

CHOICE = """
distill:
  signal:
    class_path: erpd_lightning.AutoSignal
    init_args: {prompts: 4, samples: 2, teachers: [teacher, mild, wrong], denominators: [unlearned]}
teachers:
  mild: {kl_coef: 0.3, trainer: {max_epochs: 1}}
  wrong: {sign: -1, keep: best, learning_rate: 0.005}
"""


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    (tmp_path / "choice.yaml").write_text(CHOICE)
    return [f"--config={tmp_path / 'choice.yaml'}"]


def test_a_round_of_several_teachers_and_a_choice(options: list[str], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["erpd_lightning"])
        ERPDCLI(args=[*arguments(tmp_path / "run"), *options])
    (entry,) = json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"]
    assert list(entry["policies"]) == ["base", "teacher", "unlearned", "mild", "wrong", "student"]
    rows = entry["candidates"]
    assert 6 <= len(rows) <= 9
    assert entry["rollouts"] == 12 * 8 + len(rows) * 4 * 2
    (chosen,) = (row for row in rows if row["candidate"] == entry["signal"])
    best = max(rows, key=lambda row: row["pass@1"])
    # The standard error of a difference is at most the sum of the two.
    assert best["pass@1"] - chosen["pass@1"] <= best["pass@1_stderr"] + chosen["pass@1_stderr"] + 1e-9
    assert entry["budget"] == (chosen["budget"] or chosen["kl_on_stored_states"])
    signs = {
        name: json.loads((tmp_path / "run" / "round-1" / "teachers" / name / "stage.json").read_text())
        for name in ("mild", "wrong")
    }
    assert signs["wrong"]["settings"]["teachers.wrong"]["sign"] == -1
    assert signs["mild"]["settings"]["teachers.mild"]["kl_coef"] == 0.3
    assert signs["mild"]["settings"]["teachers.mild.trainer"]["max_epochs"] == 1


def test_killed_at_any_point_it_ends_the_same(runs: Runs, options: list[str], tmp_path: Path) -> None:
    extra = {"extreme_region.stop_at_kl": 1e-6, "extreme_region_trainer.max_epochs": 3}
    alone, killed = ([*arguments(tmp_path / name, **extra), *options] for name in ("alone", "killed"))
    runs.run(alone)
    kills = (
        Kill(f"{MODULE}.export", count=2),  # after the base policy's; training was stopped by the KL
        written("teachers/wrong/stage.json"),
        Kill("erpd_lightning.data.samplers.tilted:TiltedSampler.sample", count=2),
        written("signal_selection/stage.json"),
        after(written("signal_selection/stage.json")),
    )
    runs.run_killed(killed, kills)
    assert contents(tmp_path / "killed") == contents(tmp_path / "alone")
