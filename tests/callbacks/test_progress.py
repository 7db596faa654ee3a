"""Progress of sampling: what is counted while a batch is drawn, and what is printed of it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from erpd_lightning.callbacks import SamplingProgress
from erpd_lightning.callbacks import progress as module
from erpd_lightning.data.progress import listening, tell_drawn
from erpd_lightning.data.prompt_batches import PromptBatch, PromptBatcher
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samplers import TransformersSampler
from erpd_lightning.errors import InvalidArgument
from erpd_lightning.modules.evaluation import EvaluationModule
from erpd_lightning.modules.policy_module import PolicyModule
from support.policies import TASK, make_model, save_policy, write_prompts
from support.trainers import make_trainer

PROMPTS = [("1+2:", "3"), ("2+2:", "4"), ("4-1:", "3")]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy") / "base")


@pytest.fixture
def data(policy: Path, tmp_path: Path) -> RolloutDataModule:
    prompts = write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    held_out = write_prompts(tmp_path / "held_out.jsonl", PROMPTS[:2])
    sampler = TransformersSampler(6, batch_size=4)
    return RolloutDataModule(
        tmp_path / "rollouts",
        policy,
        prompts,
        held_out,
        sampler=sampler,
        group_size=4,
        validation_samples=3,
    )


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock takes a second."""
    seconds = iter(range(10**6))
    monkeypatch.setattr(module, "monotonic", lambda: float(next(seconds)))


def test_a_batch_tells_of_every_token_as_it_is_drawn() -> None:
    heard: list[tuple[int, int]] = []
    prompts = [[3, 13, 4], [6, 14, 7, 15]] * 10
    sampler = TransformersSampler(12, batch_size=8)
    with listening(lambda tokens, responses: heard.append((tokens, responses))):
        drawn = sampler.sample(make_model(), TASK.tokenizer(), prompts, seed=1)
    tell_drawn(7)  # Nobody hears it.
    assert sum(tokens for tokens, _ in heard) == sum(len(response.ids) for response in drawn)
    assert {response.finish_reason for response in drawn} == {"stop", "length"}
    assert sum(responses for _, responses in heard) == len(drawn)
    assert len(heard) >= sum(max(len(r.ids) for r in drawn[first : first + 8]) for first in (0, 8, 16))
    assert drawn == sampler.sample(make_model(), TASK.tokenizer(), prompts, seed=1)


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize(("doing", "total"), [("sampling", 12), ("evaluating", 6), ("validating", 6)])
def test_lines_now_and_then(
    data: RolloutDataModule, policy: Path, capsys: pytest.CaptureFixture[str], doing: str, total: int
) -> None:
    trainer = make_trainer(SamplingProgress(every_seconds=3))
    run(trainer, doing, policy, data)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"[{doing}] ")]
    counts = [[int(word.replace(",", "")) for word in line.split() if word[:1].isdigit()] for line in lines]
    assert len(lines) > 2
    assert all(f" of {total} responses, " in line for line in lines)
    tokens = [count[2] for count in counts]
    assert tokens == sorted(tokens)
    assert tokens[0] < tokens[-1]
    assert any(" left" in line for line in lines)


def test_what_takes_no_time_is_not_told_of(
    data: RolloutDataModule, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(make_trainer(SamplingProgress()), "evaluating", policy, data)
    assert "responses" not in capsys.readouterr().out


@pytest.mark.usefixtures("ticking")
def test_a_terminal_shows_one_line(
    data: RolloutDataModule, policy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    run(make_trainer(SamplingProgress()), "sampling", policy, data)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    states = out.rstrip("\n").split("\r")
    assert len(states) > 5
    tokens = [int(state.split(", ")[1].split()[0]) for state in states[1:]]
    assert tokens == sorted(tokens)


def test_a_time_between_lines_that_is_none() -> None:
    with pytest.raises(InvalidArgument, match=r"^every_seconds is 0: it must be above 0$"):
        SamplingProgress(0)


@pytest.mark.usefixtures("ticking")
def test_after_a_failure_nobody_listens(
    data: RolloutDataModule, policy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(EvaluationModule, "evaluate", fail)
    with pytest.raises(RuntimeError, match="no"):
        run(make_trainer(SamplingProgress(0.5)), "evaluating", policy, data)
    tell_drawn(7)
    assert "evaluating" not in capsys.readouterr().out


def run(trainer: Trainer, doing: str, policy: Path, data: RolloutDataModule) -> None:
    actions: dict[str, Callable[[], Any]] = {
        "sampling": lambda: trainer.predict(PolicyModule(policy, references={}), datamodule=data.sampling()),
        "evaluating": lambda: trainer.test(EvaluationModule(policy), datamodule=data, verbose=False),
        "validating": lambda: trainer.validate(EvaluationModule(policy), datamodule=data, verbose=False),
    }
    actions[doing]()


def test_what_is_drawn_is_counted_without_making_any_batch(
    data: RolloutDataModule, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch is made when its turn comes, once: it takes the tokens of its prompts."""
    made: list[int] = []
    make = PromptBatcher._batch

    def noted(batcher: PromptBatcher, *args: Any) -> PromptBatch:
        made.append(args[-1])
        return make(batcher, *args)

    monkeypatch.setattr(PromptBatcher, "_batch", noted)
    module_, sampling = PolicyModule(policy, references={}), data.sampling()
    make_trainer(SamplingProgress()).predict(module_, datamodule=sampling, return_predictions=False)
    assert made == [0, 1, 2]
    batches = data.batcher.batches(data.prompt_plan.held_out, 3, "validation")
    assert list(batches.responses) == [len(batch.prompts) * batch.samples for batch in batches] == [3, 3]
