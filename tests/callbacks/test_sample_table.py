"""Samples against slow references; logged tables; training is not affected."""

import math
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from erpd_lightning.callbacks import ResumeCheckpoint, SampleTable
from erpd_lightning.callbacks.samples import MIN_TERMINAL_WIDTH, Sample, format_samples, log_samples, sample_responses
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samplers import Response, TransformersSampler
from erpd_lightning.data.samples import token_texts
from erpd_lightning.errors import UserError
from erpd_lightning.models.policy import load_policy
from erpd_lightning.modules.eval_mode import eval_mode
from erpd_lightning.modules.extreme_region import ExtremeRegionModule
from erpd_lightning.text import width
from support import monitoring
from support.policies import (
    TASK,
    make_model,
    make_rows,
    save_policies,
    token_logps,
    write_prompts,
    write_rollouts,
)
from support.processes import start_ranks
from support.trainers import make_trainer
from support.verifiers import Short


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two policies, rollouts and prompts."""
    folder = tmp_path_factory.mktemp("samples")
    save_policies(folder, "base", "student")
    write_rollouts(folder / "rollouts", make_rows())
    write_prompts(folder / "prompts.jsonl", [(row["prompt"], row["answer"]) for row in TASK.prompts(0)[0][:5]])
    return folder


# What is measured.


@pytest.mark.parametrize("max_tokens", [10_000, 20])
def test_signal_and_kl_of_responses(folder: Path, max_tokens: int) -> None:
    data = RolloutDataModule(
        folder / "rollouts",
        folder / "base",
        validation_prompts=folder / "prompts.jsonl",
        sampler=TransformersSampler(max_new_tokens=6),
        verifier=Short(),
        max_tokens=max_tokens,
    )
    (batch,) = data.batcher.batches(data.prompt_plan.held_out, 3, "sample table", 0, 1)
    with torch.no_grad():
        found = sample_responses(load_policy(folder / "student"), load_policy(folder / "base"), batch)
    rows = batch.respond(make_model(1)).to_pylist()
    assert len(found) == len(rows) == 15
    assert len({len(row["response_ids"]) for row in rows}) > 2
    student, base = make_model(1), make_model(0)
    for sample, row in zip(found, rows, strict=True):
        own = token_logps(student, row["prompt_ids"], row["response_ids"]).detach()
        other = token_logps(base, row["prompt_ids"], row["response_ids"]).detach()
        ids = torch.tensor(row["response_ids"])[:, None]
        signal = (own - other).gather(1, ids)[:, 0]
        assert sample.signal == pytest.approx(signal.tolist(), abs=1e-4)
        assert sample.kl == pytest.approx(float((own.exp() * (own - other)).sum()), rel=1e-4)
        assert sample.prompt == row["prompt"]
        assert "".join(token for token in sample.tokens if len(token) == 1) == row["response"]
        assert len(sample.tokens) == len(row["response_ids"])
        assert sample.reward == float(len(row["response"]) < 6)
        assert sample.truncated == (row["response_ids"][-1] != 2)
    assert {sample.reward for sample in found} == {0.0, 1.0}


def test_what_could_not_be_checked_has_no_reward(folder: Path) -> None:
    class Unsure(Short):
        def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
            return [None for _ in responses]

    data = RolloutDataModule(
        folder / "rollouts",
        folder / "base",
        validation_prompts=folder / "prompts.jsonl",
        sampler=TransformersSampler(max_new_tokens=6),
        verifier=Unsure(),
    )
    (batch,) = data.batcher.batches(data.prompt_plan.held_out[:1], 1, "sample table", 0, 1)
    (sample,) = sample_responses(load_policy(folder / "base"), None, batch)
    assert (sample.reward, sample.kl, sample.signal) == (None, None, None)
    assert "not checked" in format_samples("title", [sample], 80, 100)


class Sentence:
    """Decodes like tokenizers that drop the space that a text begins with, and bytes that are no character alone."""

    words = (" the", " cat", "s", b"\xe4", b"\xb8\xad")

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        raw = b"".join(w if isinstance(w, bytes) else w.encode() for w in (self.words[i] for i in ids))
        return raw.decode(errors="replace").removeprefix(" ")


def test_tokens_keep_their_spaces() -> None:
    assert token_texts(Sentence(), [0, 1, 2, 0]) == ["the", " cat", "s", " the"]
    assert token_texts(Sentence(), [1, 3, 4, 1]) == ["cat", "\ufffd", "\ufffd\ufffd", " cat"]
    assert token_texts(Sentence(), []) == []


# Text.


def test_marks_by_hand() -> None:
    signal = [1.5, 1.0, 0.11, 0.1, -0.05, -0.1, -0.99, -1.0, -200.0, math.inf, math.nan]
    sample = Sample("p", list("abcdefghijk"), 1.0, False, 0.25, signal)
    lines = format_samples("title", [sample], 80, 100).splitlines()
    assert lines[0] == "title"
    assert lines[-3:] == ["reward 1, 11 tokens, KL 0.25 nats", "abcdefghijk", "*++..--==*?"]


def test_what_is_shown_is_cut_to_the_width_and_to_the_tokens() -> None:
    sample = Sample("long " * 20, ["中", "\n", "ab"] * 20, 0.0, True, 1.0, [0.5, -0.5, 0.0] * 20)
    text = format_samples("a title of some length", [sample] * 2, 20, 31)
    assert max(width(line) for line in text.splitlines()) == 20
    assert "and 29 more tokens" in text.replace("\n", "")
    assert "60 tokens, cut off" in text.replace("\n", "")
    assert "++--..++" in text
    assert r"中\nab中" in text


def test_colours_are_for_terminals_alone() -> None:
    sample = Sample("p", ["a", "b", "c"], 0.0, False, 1.0, [2.0, 0.0, -0.5])
    plain, coloured = (format_samples("t", [sample], 80, 9, colour) for colour in (False, True))
    assert "\033" not in plain
    assert coloured.splitlines()[-2] == "\033[1;32ma\033[0mb\033[31mc\033[0m"
    assert coloured.splitlines()[-1] == plain.splitlines()[-1] == "*.-"


# What is shown, and when.


class Screen:
    """Standard output that may be a terminal."""

    def __init__(self, is_terminal: bool, encoding: str = "utf-8") -> None:
        self.written: list[str] = []
        self.is_terminal = is_terminal
        self.encoding = encoding

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str) -> None:
        text.encode(self.encoding)
        self.written.append(text)

    def flush(self) -> None:
        pass

    @property
    def text(self) -> str:
        return "".join(self.written)


@pytest.mark.parametrize(("columns", "expected"), [("3", MIN_TERMINAL_WIDTH), ("33", 33), ("0", 80)])
def test_the_width_is_the_terminal_s(
    folder: Path, monkeypatch: pytest.MonkeyPatch, columns: str, expected: int
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("os.get_terminal_size", lambda *_: (_ for _ in ()).throw(OSError))
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Screen(is_terminal=True, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    monitoring.fit(folder, SampleTable(), epochs=1)
    monkeypatch.undo()
    assert "\033[" in screen.text
    lines = re.sub("\033\\[[0-9;]*m", "", screen.text).splitlines()
    assert max(len(line) for line in lines) == expected
    screen = Screen(is_terminal=True)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("NO_COLOR", "1")
    monitoring.fit(folder, SampleTable(), epochs=1)
    assert "\033[" not in screen.text


def titles(printed: str) -> list[int]:
    return [int(line.split()[-1]) for line in printed.splitlines() if line.startswith("Samples after")]


@pytest.mark.parametrize(("every", "epochs", "steps"), [(1, 3, [3, 6, 9]), (2, 3, [6, 9]), (2, 2, [6]), (5, 2, [6])])
def test_every_so_many_validations_and_at_the_end(
    folder: Path, capsys: pytest.CaptureFixture[str], every: int, epochs: int, steps: list[int]
) -> None:
    monitoring.fit(folder, SampleTable(prompts=2, samples=3, every_n_validations=every), epochs=epochs)
    printed = capsys.readouterr().out
    assert titles(printed) == steps
    assert printed.count("prompt: ") == 6 * len(steps)


def test_the_draws_are_the_same_each_time(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitoring.fit(folder, SampleTable(every_n_validations=1), epochs=2, learning_rate=1e-30)
    first, second = capsys.readouterr().out.split("Samples after optimiser step")[1:]
    assert first.splitlines()[1:] == second.splitlines()[1:]
    assert "KL 0 nats" in first


def test_going_on_keeps_count(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saver = ResumeCheckpoint(tmp_path, every_n_steps=100)
    monitoring.fit(folder, SampleTable(every_n_validations=3), saver, epochs=2)
    capsys.readouterr()
    table = SampleTable(every_n_validations=3)
    monitoring.fit(folder, table, epochs=4, ckpt_path=saver.latest())
    assert titles(capsys.readouterr().out) == [9, 12]
    assert table.validations == 4


def test_without_held_out_prompts_nothing_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitoring.fit(folder, SampleTable(), validated=False)
    assert capsys.readouterr().out == ""


def test_without_a_base_policy_there_is_no_signal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitoring.fit(folder, SampleTable(), epochs=1, references={})
    printed = capsys.readouterr().out
    assert printed.count("prompt: ") == 4
    assert "reward" in printed
    assert "KL" not in printed
    assert "signal" not in printed


def test_its_cost_is_logged(folder: Path) -> None:
    notes, table = monitoring.Notes(), SampleTable(every_n_validations=1)
    monitoring.fit(folder, table, logger=notes)
    found = {step: logged["sample_table/seconds"] for step, logged in notes.logged if "sample_table/seconds" in logged}
    assert found.keys() == {2, 5}
    assert 0 < found[2] < found[5] == table.seconds


# Loggers.


class Recorder:
    """Notes every call of any method."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def fake(kind: type) -> tuple[Any, Recorder]:
    """A logger of a kind without its package."""
    recorder = Recorder()
    members = {"experiment": recorder, "log_table": recorder.log_table, "run_id": "run-1"}
    members["__init__"] = lambda self: None
    return type(kind.__name__, (kind,), members)(), recorder


SAMPLE = Sample("1+1:", ["2", "\ud800", "<b>\n"], None, True, 0.5, [0.25, -2.0, 0.0])


def test_tensorboard_gets_text() -> None:
    logger, recorder = fake(TensorBoardLogger)
    log_samples(logger, "title", [SAMPLE], 100, 7)
    ((name, (tag, text, step), _),) = recorder.calls
    assert (name, tag, step) == ("add_text", "samples", 7)
    assert all(line.startswith("    ") for line in text.split("\n"))
    assert r"2\ud800<b>\n" in text
    text.encode()


def test_mlflow_gets_text() -> None:
    logger, recorder = fake(MLFlowLogger)
    log_samples(logger, "title", [SAMPLE], 100, 7)
    ((name, (run, text, file), _),) = recorder.calls
    assert (name, run, file) == ("log_text", "run-1", "samples/step-00000007.txt")
    assert text.startswith("title\n")


def test_weights_and_biases_gets_a_table() -> None:
    logger, recorder = fake(WandbLogger)
    log_samples(logger, "title", [SAMPLE, SAMPLE], 2, 7)
    ((name, _, given),) = recorder.calls
    assert (name, given["key"], given["step"]) == ("log_table", "samples", 7)
    row = dict(zip(given["columns"], given["data"][1], strict=True))
    assert row == {
        "step": 7,
        "prompt": "1+1:",
        "response": r"2\ud800",
        "reward": None,
        "tokens": 3,
        "truncated": True,
        "kl_per_response": 0.5,
        "signal": r"2(+0.25) \ud800(-2.00)",
    }


def test_others_get_the_seconds_alone(folder: Path, tmp_path: Path) -> None:
    monitoring.fit(folder, SampleTable(), epochs=1, logger=CSVLogger(tmp_path, name="logs", version=0))
    header = (tmp_path / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert [name for name in header if name.startswith("sample")] == ["sample_table/seconds"]
    assert not {"wandb", "mlflow"} & sys.modules.keys()


# Training is left alone.


class Rude(TransformersSampler):
    """A sampler of a user's that draws from every generator there is and leaves the model in eval mode."""

    def sample(self, model: Any, tokenizer: Any, prompts: Any, seed: int) -> list[Response]:
        draws = (torch.rand(3), np.random.rand(3), random.random())
        assert draws
        found = super().sample(model, tokenizer, prompts, seed)
        model.eval()
        return found


class Generators(Callback):
    """Notes the state of all generators, and of the modules, when each batch begins."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        modes = [part.training for part in pl_module.modules()]
        drawn = (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))
        self.seen.append((drawn, modes))


def test_a_run_with_it_ends_like_one_without(folder: Path) -> None:
    ends = []
    for callbacks in ([], [SampleTable(every_n_validations=1)], [SampleTable(every_n_validations=2)]):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        generators = Generators()
        module = monitoring.fit(folder, *callbacks, generators, epochs=3, sampler=Rude(max_new_tokens=6))
        ends.append((monitoring.weights(module), generators.seen))
    assert not torch.equal(ends[0][0], monitoring.weights(monitoring.fit(folder, epochs=1)))
    for weights, seen in ends[1:]:
        assert torch.equal(weights, ends[0][0])
        assert seen == ends[0][1]


def test_modes_and_generators_are_restored() -> None:
    module, trainer = LightningModule(), make_trainer()
    module.inner = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    module.inner[1].eval()
    before = torch.get_rng_state()
    with eval_mode(trainer, module):
        torch.rand(3)
        assert not any(part.training for part in module.modules())
    assert [part.training for part in module.modules()] == [True, True, True, False, False]
    assert torch.equal(torch.get_rng_state(), before)


def test_two_processes_show_the_same_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = monitoring.samples(folder, 1)
    first, second = start_ranks(monitoring.__file__, folder, "samples")
    assert second["printed"] == ""
    assert titles(first["printed"]) == titles(one["printed"]) == [3, 6]
    assert first["printed"].count("prompt: ") == 6
    prompts = [line for line in one["printed"].splitlines() if line.startswith("prompt: ")]
    assert [line for line in first["printed"].splitlines() if line.startswith("prompt: ")] == prompts
    for seen in (one, first, second):
        assert torch.equal(seen["with"], seen["without"])


def test_no_other_policy_is_left_in_memory(folder: Path) -> None:
    class Frozen(Callback):
        """Whether frozen policies are left when Lightning has taken the policy from its device."""

        left = True

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            self.left = bool(pl_module._references)

    frozen = Frozen()
    monitoring.fit(folder, SampleTable(), frozen, epochs=1)
    assert not frozen.left


# What it refuses.


@pytest.mark.parametrize("name", ["prompts", "samples", "every_n_validations", "max_tokens"])
def test_settings_that_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is 0: it must be at least 1"):
        SampleTable(**{name: 0})


def test_modules_and_data_that_are_refused(folder: Path) -> None:
    trainer: Any = SimpleNamespace(datamodule=None)
    with pytest.raises(UserError, match="RolloutDataModule"):
        SampleTable().on_fit_start(trainer, ExtremeRegionModule(folder / "base"))
    trainer.datamodule = RolloutDataModule(folder / "rollouts", folder / "base")
    with pytest.raises(UserError, match="Scripted has none"):
        SampleTable().on_fit_start(trainer, monitoring.Scripted())
