"""The command line: what it accepts, what it shows, and how it ends when something is wrong.

One small run, a process of its own, is shared by all tests; most others call `main` in this process, because
importing takes longer than the test. A mistake has to end in exit code 2 and a line or two: any other exception
leaves `main` and fails the test.
"""

import errno
import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from erpd_lightning import DistillModule, ExtremeRegionModule, RolloutDataModule
from erpd_lightning.callbacks import Throughput
from erpd_lightning.cli.main import main
from erpd_lightning.data.verifiers import Verifier
from erpd_lightning.models.policy import policy_fingerprint
from erpd_lightning.pipeline.rounds import STAGES as ALL_STAGES
from erpd_lightning.pipeline.rounds import Rounds
from erpd_lightning.report.command import main as report
from support.chain import DEMO, arguments, parsers_built_once

ROOT = Path(__file__).parents[2]

STAGES = [stage for stage in ALL_STAGES if stage != "choice"]
"""Those of a run whose signal is given."""


class AlwaysRight(Verifier):
    """Rewards everything."""

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        return [1.0 for _ in responses]


Run = Callable[..., str]


@pytest.fixture(autouse=True, scope="module")
def _parsers_are_built_once() -> Iterator[None]:
    with parsers_built_once():
        yield


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls `main` with arguments and returns what it printed."""

    def call(*args: object) -> str:
        monkeypatch.setattr(sys, "argv", ["erpd_lightning", *map(str, args)])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def refused(run: Run, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls `main` with arguments that hold a mistake, and returns its one line about it."""

    def call(*args: object) -> str:
        with pytest.raises(SystemExit) as ended:
            run(*args)
        lines = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code == 2, lines
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: "), lines
        assert len(lines[0]) < 330, lines
        return lines[0].removeprefix("error: ")

    return call


@pytest.fixture
def shown(run: Run, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls `main` with `--help` or `--print_config`, and returns what is shown."""

    def call(*args: object) -> str:
        with pytest.raises(SystemExit) as ended:
            run(*args)
        captured = capsys.readouterr()
        assert ended.value.code == 0, captured.err
        return captured.out

    return call


@pytest.fixture
def chain(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rounds]:
    """What `fit` would run, with all that was configured."""

    def call(*args: object) -> Rounds:
        found: list[Rounds] = []
        with monkeypatch.context() as patch:
            patch.setattr(Rounds, "run", lambda self: found.append(self))
            run(*args)
        return found[0]

    return call


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run, and what it printed."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    command = [sys.executable, "-m", "erpd_lightning", *arguments(run_dir)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return run_dir, result.stdout


@pytest.fixture
def copy(finished: tuple[Path, str], tmp_path: Path) -> Callable[..., Path]:
    """A copy of the finished run without some stages of its round."""

    def call(*without: str) -> Path:
        run_dir = tmp_path / "run"
        shutil.copytree(finished[0], run_dir)
        for stage in without:
            shutil.rmtree(run_dir / "round-1" / stage)
        return run_dir

    return call


@pytest.fixture
def own_policy(finished: tuple[Path, str], tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a run on prompts of one's own instead of the task's."""

    def call(prompts: str | None, validation: str | None = '{"prompt": "1+1:", "answer": 2}\n') -> list[str]:
        overrides: dict[str, Any] = {"data.prompts_per_round": "null"}
        for key, text in (("prompts", prompts), ("validation_prompts", validation)):
            overrides[f"data.{key}"] = tmp_path / f"{key}.jsonl"
            if text is not None:
                overrides[f"data.{key}"].write_text(text)
        given = arguments(tmp_path / "run", **overrides)
        kept = [argument for argument in given if not argument.startswith("--task")]
        return [*kept, "--task=null", f"--policy={finished[0] / 'base'}"]

    return call


def digests(folder: Path) -> dict[str, str]:
    """Every file below a folder, by content."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def student(run_dir: Path) -> str:
    return policy_fingerprint(run_dir / "round-1" / "distill" / "student")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def with_yaml(path: Path, text: str) -> list[str]:
    """The smallest run with a configuration file over it."""
    return [*arguments(path / "run"), f"--config={write(path / 'more.yaml', text)}"]


# What a run leaves and shows


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


# Options


def leaves(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a nested configuration, as the command line calls them."""
    if isinstance(config, dict):
        inner = config.get("init_args", {}) if "class_path" in config else config
        if "class_path" in config:
            yield key, config["class_path"]
        for name, value in inner.items():
            yield from leaves(value, f"{key}.{name}" if key else name)
    else:
        yield key, config


def help_texts(text: str) -> dict[str, str]:
    """The sentence about each option, without its type and default."""
    _, _, text = text.partition("\noptions:")
    texts = {}
    for entry in re.split(r"\n  (?=-)", text)[1:]:
        first, *rest = entry.split("\n\n")[0].split("\n")
        names, _, start = first.partition("  ")
        sentence = " ".join(" ".join([start, *rest]).split())
        name = re.findall(r"--([\w.]+)", names)[-1]
        texts[name] = re.sub(r"\((required, )?type: .*", "", sentence)
    return texts


@pytest.mark.parametrize("command", ["fit", "predict", "preview"])
def test_help_has_a_sentence_for_every_option(command: str, shown: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    text = shown(command, "--help")
    assert text.startswith("usage: python -m erpd_lightning [options] ")
    texts = help_texts(text)
    silent = [name for name, sentence in texts.items() if len(sentence.split()) < 3]
    assert silent == []
    usage = text.partition("\noptions:")[0]
    assert {name for name in re.findall(r"--([\w.]+)", usage)} <= set(texts)
    assert {"distill.kl_budget", "rounds", "data.group_size", "trainer.max_epochs", "distill_trainer"} <= set(texts)
    assert all(stage in texts["stage"] for stage in ALL_STAGES)
    assert ("budgets" in texts) == (command == "preview")
    assert not {"data.store", "extreme_region.sign", "trainer.default_root_dir", "ckpt_path"} & set(texts) - {
        "ckpt_path" if command == "predict" else ""
    }


def test_help_tells_of_the_report(shown: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert "'report RUN [RUN ...]' writes an HTML page on runs" in shown("--help")


def test_print_config_holds_every_option_with_its_default(shown: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = dict(leaves(yaml.safe_load(shown("fit", "--print_config"))))
    options = set(help_texts(shown("fit", "--help"))) - {"config", "help", "print_config"}
    groups = {"data", "extreme_region", "distill", "trainer"}
    assert {option for option in options if not option.endswith(".help")} - groups <= set(printed)
    classes = {"data": RolloutDataModule, "extreme_region": ExtremeRegionModule, "distill": DistillModule}
    plain = 0
    for group, target in classes.items():
        for name, parameter in inspect.signature(target).parameters.items():
            if f"{group}.{name}" in printed and isinstance(parameter.default, int | float | str):
                assert printed[f"{group}.{name}"] == parameter.default, name
                plain += 1
    assert plain > 10
    assert printed["data.sampler"].endswith("TransformersSampler")
    assert printed["data.sampler.temperature"] == 1.0
    assert printed["extreme_region.objective.tau_negative"] == 1.05
    assert printed["distill.signal.terms"] == [
        {"numerator": "teacher", "denominator": "unlearned", "weight": 1.0, "clip": 3.0}
    ]


def test_print_config_parses_back_to_itself(shown: Run, tmp_path: Path) -> None:
    printed = shown(*arguments(tmp_path / "run"), "--print_config")
    again = shown("fit", "--config", write(tmp_path / "printed.yaml", printed), "--print_config")
    assert again == printed
    assert "group_size: 8" in printed


def test_overrides_by_dotted_name_land(chain: Callable[..., Rounds], tmp_path: Path) -> None:
    overrides = "--distill.kl_budget 0.03 --rounds 3 --seed_everything 7 --distill_trainer.max_epochs 2"
    more = [
        "--data.sampler.temperature=0.7",
        "--extreme_region.objective=CrossEntropy",
        '--distill.signal.terms=[{"numerator": "teacher", "denominator": "base", "clip": 1}]',
        "--unlearned.kl_coef=0.3",
        "--trainer.gradient_clip_val=0.5",
        "--task.operations=2",
    ]
    rounds = chain("fit", "--config", DEMO, "--run_dir", tmp_path, *overrides.split(), *more)
    assert (rounds.rounds, rounds.seed, rounds.run_dir) == (3, 7, tmp_path)
    assert rounds.task is not None
    assert rounds.task.operations == 2
    build = rounds.builder
    module: Any = build.module("distill", policy="")
    assert module.kl_budget == 0.03
    assert (module.signal.policies, module.signal.terms[0].clip) == (["base", "teacher"], 1.0)
    assert build.trainer("distill").max_epochs == 2
    assert build.data(store="", tokenizer="").sampler.temperature == 0.7
    for stage, kl_coef, sign in (("extreme_region", 0.0, 1), ("unlearned", 0.3, -1)):
        module = build.module(stage, policy="")
        assert type(module.objective).__name__ == "CrossEntropy"
        assert (module.kl_coef, module.sign) == (kl_coef, sign)
        assert build.trainer(stage).gradient_clip_val == 0.5
    assert build.settings("unlearned")["unlearned"]["kl_coef"] == 0.3
    # The task says how its policy is trained.
    assert build.trainer("base").gradient_clip_val == 1.0


STAGE_TRAINERS = """
trainer:
  max_epochs: 3
  callbacks: {class_path: erpd_lightning.callbacks.Throughput}
distill_trainer:
  max_epochs: 5
  gradient_clip_val: 0.1
  callbacks:
  - class_path: lightning.pytorch.callbacks.EarlyStopping
    init_args: {monitor: val/pass@1}
  logger: false
extreme_region_trainer: null
"""


def test_trainer_settings_of_a_stage_go_over_the_shared_ones(chain: Callable[..., Rounds], tmp_path: Path) -> None:
    build = chain(*with_yaml(tmp_path, STAGE_TRAINERS)).builder
    shared, own = build.trainer("extreme_region"), build.trainer("distill")
    assert (shared.max_epochs, own.max_epochs) == (3, 5)
    assert (shared.gradient_clip_val, own.gradient_clip_val) == (1.0, 0.1)

    def kinds(trainer: Any) -> set[type]:
        return {type(callback) for callback in trainer.callbacks} & {Throughput, EarlyStopping}

    assert (kinds(shared), kinds(own)) == ({Throughput}, {EarlyStopping})
    assert kinds(build.trainer("base")) == set()
    recorded = build.settings("distill")["distill_trainer"]
    assert recorded["max_epochs"] == 5
    assert not {"logger", "devices"} & set(recorded)
    # What only watches leaves no trace; what may stop a stage or change its weights does.
    assert [callback["class_path"].rpartition(".")[2] for callback in recorded["callbacks"]] == ["EarlyStopping"]
    assert "callbacks" not in build.settings("extreme_region")["extreme_region_trainer"]


def test_a_stage_whose_length_nobody_gave(chain: Callable[..., Rounds], tmp_path: Path) -> None:
    args = ["--task=erpd_lightning.data.arithmetic.Arithmetic", f"--run_dir={tmp_path / 'run'}"]
    build = chain("fit", *args).builder
    assert [build.trainer(stage).max_epochs for stage in ("extreme_region", "unlearned", "distill")] == [8, 1, 4]
    build = chain("fit", *args, "--trainer.max_steps=7", "--distill_trainer.max_epochs=2").builder
    assert [build.trainer(stage).max_steps for stage in ("extreme_region", "distill")] == [7, 7]
    assert [build.trainer(stage).max_epochs for stage in ("extreme_region", "distill")] == [None, 2]


# Stages by themselves


def test_stages_one_by_one_make_the_same_student(
    finished: tuple[Path, str], run: Run, refused: Run, tmp_path: Path
) -> None:
    watched = f"""
distill_trainer:
  max_epochs: 2
  callbacks:
  - class_path: erpd_lightning.callbacks.Throughput
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {{save_dir: {tmp_path / "tensorboard"}}}
"""
    args = with_yaml(tmp_path, watched)
    folder = tmp_path / "run" / "round-1"
    assert "needs the stage base in" in refused(*args, "--stage=signal")
    run(*args, "--stage=base")
    assert "[base] base: done already" in run(*args, "--stage=base")
    assert "needs the stage rollouts in" in refused(*args, "--stage=extreme_region")
    for stage in STAGES[1:]:
        assert not (folder / stage / "stage.json").exists()
        out = run(*args, f"--stage={stage}")
        assert f"[round 1/1] {stage}: " in out
    assert student(tmp_path / "run") == student(finished[0])
    summaries = [json.loads((path / "summary.json").read_text()) for path in (tmp_path / "run", finished[0])]
    assert summaries[0]["rounds"][0]["policies"] == summaries[1]["rounds"][0]["policies"]
    # The logger and the callback of one stage were that stage's alone.
    assert len(list((tmp_path / "tensorboard").rglob("events.out.*"))) == 1
    assert not (folder / "distill" / "metrics").exists()
    metrics = next((folder / "extreme_region" / "metrics").rglob("metrics.csv")).read_text()
    assert "throughput/tokens_per_second" not in metrics
    events = next((tmp_path / "tensorboard").rglob("events.out.*")).read_bytes()
    assert b"throughput/tokens_per_second" in events


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--stage=foo", "stage is 'foo': it must be one of base, rollouts"),
        ("--round=9", "round is 9: it must lie between 1 and rounds (1)"),
        ("--rounds=0", "rounds (0)"),
        ("--checkpoint_every=0", "checkpoint_every (0)"),
    ],
)
def test_a_stage_or_round_out_of_range(refused: Run, tmp_path: Path, given: str, expected: str) -> None:
    assert expected in refused(*arguments(tmp_path), given)


def test_stages_that_the_run_does_not_have(refused: Run, tmp_path: Path, own_policy: Any) -> None:
    signal = '--distill.signal.terms=[{"numerator": "teacher", "denominator": "base"}]'
    message = refused(*arguments(tmp_path), signal, "--stage=unlearned")
    assert message == "stage is 'unlearned', but distill.signal uses no unlearned policy"
    assert refused(*own_policy("", None), "--stage=base").startswith("stage is 'base', but policy gives")


# validate, test, predict


@pytest.mark.parametrize("stage", ["distill", "extreme_region"])
@pytest.mark.parametrize("command", ["validate", "test"])
def test_validate_and_test_measure_the_policy_of_a_stage(
    finished: tuple[Path, str], run: Run, command: str, stage: str
) -> None:
    out = run(*arguments(finished[0], command), f"--stage={stage}")
    prefix = {"validate": "val", "test": "test"}[command]
    for name in ("pass@1", "kl_per_token", "entropy_per_token"):
        assert re.search(rf"{prefix}/{name}[ │]+\d", out), out


def test_predict_writes_checked_responses(finished: tuple[Path, str], run: Run) -> None:
    written = {}
    for stage, policy in (("distill", "student"), ("extreme_region", "teacher"), ("base", "base")):
        path = finished[0] / "round-1" / f"predictions-{policy}.jsonl"
        out = run(*arguments(finished[0], "predict"), f"--stage={stage}")
        assert out.splitlines()[-1] == f"16 responses lie in {path}"
        written[policy] = rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == 16
        for row in rows:
            assert set(row) == {"prompt", "response", "answer", "reward", "finish_reason"}
            found = re.search(r"=\s*(-?\d+)\s*$", row["response"])
            assert row["reward"] == float(found is not None and found[1] == row["answer"])
        path.unlink()
    assert written["student"] != written["base"]


def test_a_checkpoint_of_a_stage_can_be_validated(
    finished: tuple[Path, str], run: Run, refused: Run, tmp_path: Path
) -> None:
    folder = finished[0] / "round-1" / "extreme_region" / "checkpoints"
    args = [*arguments(finished[0], "validate"), "--stage=extreme_region", "--ckpt_path"]
    checkpoint = next(folder.glob("*.ckpt"))
    assert "val/pass@1" in run(*args, checkpoint)
    damaged = tmp_path / "half.ckpt"
    damaged.write_bytes(checkpoint.read_bytes()[:-100])
    for path in (damaged, tmp_path / "none.ckpt"):
        assert refused(*args, path).startswith(f"ckpt_path {path} is missing or damaged")
    of_a_student = [*arguments(finished[0], "validate"), "--ckpt_path", str(checkpoint)]
    assert refused(*of_a_student) == "the checkpoint is not one of a distillation: it holds no beta"


def test_a_policy_that_is_not_there_yet(refused: Run, tmp_path: Path) -> None:
    message = refused(*arguments(tmp_path, "validate"))
    assert message == (
        f"{tmp_path / 'round-1' / 'distill' / 'student'} is missing: fit makes it, in the stage distill of round 1"
    )
    message = refused(*arguments(tmp_path, "predict"), "--stage=signal")
    assert message == "stage is 'signal': predict takes one of base, extreme_region, unlearned, distill"


# Mistakes in the configuration


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "erpd_lightning", *arguments(tmp_path / "run"), "--distill.kl_budgte=0.1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: distill.kl_budgte is no option: did you mean distill.kl_budget?\n"
    assert result.stdout == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # unknown keys
        ("--nonsense=3", "nonsense is no option: --help lists all that there are"),
        ("--kl_budget=3", "kl_budget is no option: did you mean distill.kl_budget?"),
        ("--data.group_sise=3", "data.group_sise is no option: did you mean data.group_size?"),
        ("--trainer.max_epoch=3", "trainer.max_epoch is no option: did you mean trainer.max_epochs?"),
        (
            "--distill_trainer.max_epoch=1",
            "distill_trainer.max_epoch is no option: did you mean distill_trainer.max_epochs?",
        ),
        ("--unlearned.kl_coeff=1", "unlearned.kl_coeff is no option: did you mean unlearned.kl_coef?"),
        ("--unlearned.sign=1", "unlearned.sign is no option: the chain of stages sets it"),
        ("--data.store=x", "data.store is no option: the chain of stages sets it"),
        ("--trainer.default_root_dir=x", "trainer.default_root_dir is no option: the chain of stages sets it"),
        # wrong types
        ("--data.group_size=x", "data.group_size: expected int, not x"),
        ("--rounds=1.5", "rounds: expected int, not 1.5"),
        ("--distill.kl_budget=many", "distill.kl_budget: expected float or null, not many"),
        ("--distill_trainer=3", "distill_trainer: expected dict or null, not 3"),
        ("--distill_trainer.max_epochs=x", "distill_trainer.max_epochs: expected int or null, not x"),
        ("--trainer.precision=foo", "trainer.precision: expected int or one of "),
        ("--seed_everything=x", "seed_everything: expected bool or int, not x"),
        ("--seed_everything=-4", "seed_everything is -4: it must lie between 0 and 4294967295"),
        ("--config=/nowhere.yaml", "config: File does not exist: '/nowhere.yaml'"),
        # classes
        ("--extreme_region.objective=SAPOO", "extreme_region.objective: SAPOO is no class path"),
        (
            "--extreme_region.objective=erpd_lightning.Nope",
            "extreme_region.objective: class_path erpd_lightning.Nope: module 'erpd_lightning' has no attribute 'Nope'",
        ),
        (
            "--extreme_region.objective=erpd_lightning.TiltedTarget",
            "extreme_region.objective: expected a subclass of ExtremeObjective or null, "
            "not erpd_lightning.TiltedTarget",
        ),
        ("--trainer.logger=foo", "trainer.logger: foo is no class path"),
        (
            '--trainer.callbacks=[{"class_path": "erpd_lightning.callbacks.KLBudget", "init_args": {"budget": 0.0}}]',
            "trainer.callbacks: KLBudget.budget is 0.0: it must be a positive, finite number of nats",
        ),
        (
            '--trainer.callbacks=[{"class_path": "erpd_lightning.callbacks.KLBudget", '
            '"init_args": {"budget": 0.1, "reference": "foo"}}]',
            "KLBudget.reference is 'foo': it is neither a folder, nor a hub name, nor among the module's references",
        ),
        ("--extreme_region.objective.tau=1", "extreme_region.objective: class_path "),
        ("--extreme_region.objective.tau_positive=-1", "extreme_region.objective: tau_positive is -1.0; it has to be"),
        ("--extreme_region.objective.tau_negative=0", "extreme_region.objective: tau_negative is 0.0; it has to be"),
        ("--distill.signal.terms=[]", "distill.signal: a signal needs at least one term"),
        (
            '--distill.signal.terms=[{"numerator": "foo"}]',
            "distill.signal: no policy is called foo; there are base, teacher, unlearned",
        ),
        ("--data.verifier.pattern=(", "data.verifier: verifier pattern '(' is no regular expression"),
        ('--distill.signal.terms=[{"weight": "x"}]', "distill.signal.terms.weight: expected float, not x"),
        (
            '--distill.signal.terms=[{"numerater": "a"}]',
            "distill.signal.terms: class_path erpd_lightning.Term: Option ",
        ),
        ("--data.sampler.max_new_tokens=x", "data.sampler.max_new_tokens: expected int, not x"),
        ("--data=/nowhere.yaml", "data: /nowhere.yaml is no configuration file"),
        ("--data.sampler.temperature=0", "data.sampler.temperature is 0.0: it must be above 0"),
        ("--task.operations=0", "task.operations is 0: it must lie between 1 and 8"),
        (
            '--distill_trainer.callbacks=[{"class_path": "lightning.pytorch.callbacks.EarlyStopping"}]',
            "distill_trainer.callbacks: class_path lightning.pytorch.callbacks.EarlyStopping: the following arguments "
            "are required: monitor",
        ),
        (
            '--unlearned_trainer.callbacks={"class_path": "EarlyStopping", "init_args": {"monitor": "a", "mode": "b"}}',
            "unlearned_trainer.callbacks: `mode` can be min, max",
        ),
        # values out of range
        ("--distill.kl_budget=0", "distill.kl_budget is 0.0: it must be a positive, finite number"),
        ("--distill.kl_budget=-0.05", "distill.kl_budget is -0.05: it must be"),
        ("--distill.kl_budget=.nan", "distill.kl_budget is nan: it must be"),
        ("--distill.kl_budget=.inf", "distill.kl_budget is inf: it must be"),
        ("--distill.kl_budget=nan", "distill.kl_budget: expected float or null, not nan"),
        ("--distill.beta=2", "give either distill.kl_budget or distill.beta"),
        ("--distill.kl_budget=null", "give either distill.kl_budget or distill.beta"),
        ("--distill.learning_rate=-1", "distill.learning_rate is -1.0: it must be a positive number"),
        ("--distill.betas=[0.9,1]", "distill.betas is (0.9, 1.0): both must be"),
        ("--extreme_region.weight_decay=-1", "extreme_region.weight_decay is -1.0"),
        ("--extreme_region.dtype=int8", "extreme_region.dtype is 'int8'"),
        ("--distill.lr_scheduler=cosin", "distill.lr_scheduler is 'cosin'"),
        ("--unlearned.kl_coef=-1", "unlearned.kl_coef is -1.0: it must be at least 0"),
        ("--extreme_region.kl_estimator=k1", "extreme_region.kl_estimator: k1 is no loss for the reverse KL: its"),
        (
            '--unlearned={"kl_direction": "forward", "kl_estimator": "k2"}',
            "unlearned.kl_estimator: k2 is no loss for the forward KL: its gradient is that of no KL",
        ),
        ("--distill.iterations=0", "distill.iterations is 0: it must be at least 1"),
        ("--distill.iterations=3", "distill_trainer.max_epochs is 2: it must be a multiple of distill.iterations (3)"),
        (
            '--distill.objective={"class_path": "ClippedPolicyGradient", "init_args": {"truncate": 0}}',
            "distill.objective: truncate is 0.0; it has to be a positive number",
        ),
        (
            '--distill={"objective": {"class_path": "ClippedPolicyGradient", "init_args": {"kl_term": false}}, '
            '"kl_budget": null, "beta": 1}',
            "distill.objective.kl_term is false, and no KL budget brings the student back: it would collapse",
        ),
        ("--distill.total_budget=0", "distill.total_budget is 0.0: it must be a positive, finite number"),
        ("--distill.signal.terms=[]", "distill.signal: a signal needs at least one term whose weight is not zero"),
        ('--distill.signal.terms=[{"weight": 0}]', "distill.signal: a signal needs at least one term whose weight"),
        (
            '--distill.signal.terms=[{"denominator": "unlerned"}]',
            "distill.signal: no policy is called unlerned; there are base, teacher, unlearned",
        ),
        ('--teachers={"mild": {"kl_coef": 0.3}}', "teachers.mild is trained in vain: distill.signal does not use it"),
        ('--teachers={"mild": {"kl_cof": 0.3}}', "teachers.mild.kl_cof is no option: did you mean"),
        ('--teachers={"mild": {"trainer": {"max_epoch": 1}}}', "teachers.mild.trainer.max_epoch is no option: did you"),
        ('--teachers={"mild": {"sign": 3}}', "teachers.mild.sign is 3: it must be 1 or -1"),
        ('--teachers={"base": {}}', "teachers.base: a policy of its own needs a name of its own"),
        ("--distill.signal=auto", "distill.signal holds out 48 prompts for previews, but data.prompts_per_"),
        ("--last_stage=signal", "last_stage is 'signal': it must be distill or extreme_region"),
        ("--data.iterations=2", "data.iterations is above 1, but a student is distilled from fixed rollouts"),
        ("--data.group_size=0", "data.group_size is 0: it must be at least 1"),
        ("--data.calibration_prompts=-1", "data.calibration_prompts is -1: it must be at least 0"),
        ("--distill.pass_at_k=9", "distill.pass_at_k is 9, but data.validation_samples is only 2"),
        ("--task.hidden_size=20", "task.hidden_size is 20: it must be a multiple of 8"),
        ("--task.learning_rate=.nan", "task.learning_rate is nan: it must be a positive number"),
        ("--task.epochs=0", "task.layers, task.epochs and task.batch_size must be at least 1"),
        ("--data.group_size=1", "data.group_size is 1: extreme_region.objective compares the responses of a group"),
        ("--trainer.devices=0", "trainer: `Trainer(devices='0')` value is not a valid input"),
        ("--distill_trainer.devices=0", "distill_trainer: `Trainer(devices=0)` value is not a valid input"),
        ("--trainer.accelerator=foo", "trainer: You selected an invalid accelerator name"),
        # the base policy
        ("--task=null", "give either policy, the base policy to start from, or task"),
        ("--policy=some/model", "give either policy, the base policy to start from, or task"),
        ("--data.prompts=x.jsonl", "data.prompts is given, but task makes the prompts"),
        ("--run_dir=/proc/nope", "run_dir /proc/nope cannot be used: "),
    ],
)
def test_a_mistake_on_the_command_line(refused: Run, tmp_path: Path, given: str, expected: str) -> None:
    assert refused(*arguments(tmp_path / "run"), given).startswith(expected)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("distil: {kl_budget: 0.1}", "distil.kl_budget is no option: did you mean distill.kl_budget?"),
        ("distill:\n  kl_budgte: 0.1", "distill.kl_budgte is no option: did you mean distill.kl_budget?"),
        ("distill_trainer:\n  max_epoch: 1", "distill_trainer.max_epoch is no option: did you mean"),
        ("distill: 3", "distill is 3: its options are expected there"),
        ("rounds: 1\ndata:", "data is None: its options are expected there"),
        ("data:\n  group_size: many", "data.group_size: expected int, not many"),
        (
            "data:\n  sampler:\n    class_path: erpd_lightning.data.samplers.TransformersSampler\n"
            "    init_args: {max_new_token: 8}",
            "data.sampler: class_path erpd_lightning.data.samplers.TransformersSampler: Option 'max_new_token' is not",
        ),
        ("trainer:\n  callbacks:\n  - class_path: erpd_lightning.callbacks.Nope", "trainer.callbacks: class_path erpd"),
        ("distill: [", "{file} cannot be read as options: while parsing"),
        ("\tdistill: 3", "{file} cannot be read as options: "),
        ("- a\n- b", "{file} cannot be read as options: - a - b"),
        ("rounds: é", "{file} cannot be read as options: 'utf-8' codec can't decode byte"),
    ],
)
def test_a_mistake_in_a_configuration_file(refused: Run, tmp_path: Path, text: str, expected: str) -> None:
    args = with_yaml(tmp_path, text)
    (tmp_path / "more.yaml").write_bytes(text.encode("latin-1"))
    message = refused(*args)
    assert message.startswith(expected.format(file=tmp_path / "more.yaml"))


@pytest.mark.parametrize("args", [[], ["fits"], ["fit", "--config"]])
def test_a_command_that_is_none(refused: Run, args: list[str]) -> None:
    refused(*args)


def test_an_estimate_of_the_kl_from_the_policy_s_own_rollouts(refused: Run, tmp_path: Path) -> None:
    args = arguments(tmp_path / "run", last_stage="extreme_region", **{"data.iterations": 2})
    estimate = ["--extreme_region.kl_coef=0.1", "--extreme_region.kl_estimator=k2"]
    assert refused(*args, *estimate).startswith("extreme_region.kl_estimator is k2, which takes rollouts for those of")


def test_a_group_of_one_is_enough_for_cross_entropy(chain: Callable[..., Rounds], refused: Run, tmp_path: Path) -> None:
    args = [*arguments(tmp_path), "--data.group_size=1", "--extreme_region.objective=CrossEntropy"]
    assert chain(*args).builder.data(store="", tokenizer="").group_size == 1
    message = refused(*args, "--unlearned.objective=erpd_lightning.SAPO")
    assert message.startswith("data.group_size is 1: unlearned.objective compares")


# Mistakes in the input


PROMPT = '{"prompt": "1+1:", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (None, "{file} is missing"),
        ("", "{file} holds no prompts"),
        ("\n\n", "{file} holds no prompts"),
        (f"{PROMPT}{{oops\n{PROMPT}", "{file}, line 2 is not JSON"),
        (f'{PROMPT}\n{{"prompt": "1+1:"}}\n', "{file}, line 3 must be an object like"),
        (f'{PROMPT}{{"answer": "2"}}\n', "{file}, line 2 must be an object like"),
        (f'{PROMPT}{{"prompt": "", "answer": "2"}}\n', "{file}, line 2: prompt must be"),
    ],
)
@pytest.mark.parametrize("which", ["prompts", "validation_prompts"])
def test_prompts_that_cannot_be_used(
    refused: Run, own_policy: Any, tmp_path: Path, which: str, prompts: str | None, expected: str
) -> None:
    texts = (prompts, PROMPT) if which == "prompts" else (PROMPT, prompts)
    message = refused(*own_policy(*texts))
    assert message.startswith(expected.format(file=tmp_path / f"{which}.jsonl"))
    assert not (tmp_path / "run").exists()


def test_no_held_out_prompts(refused: Run, own_policy: Any) -> None:
    message = refused(*own_policy(PROMPT), "--data.validation_prompts=null")
    assert message.startswith("data.validation_prompts is missing")


def test_a_prompt_that_is_longer_than_the_context_and_then_is_not(refused: Run, run: Run, own_policy: Any) -> None:
    long = json.dumps({"prompt": "1" * 40 + ":", "answer": "1"})
    message = refused(*own_policy(f"{PROMPT}{long}\n"))
    assert message.startswith("rollouts prompt 2 has 41 tokens: with data.sampler.max_new_tokens (8)")
    # Nothing was sampled: the same run directory takes the mended file.
    assert "rollouts: sampling" in run(*own_policy(PROMPT), "--stage=rollouts")


def test_a_policy_that_is_not_there(refused: Run, own_policy: Any, tmp_path: Path) -> None:
    for missing in (tmp_path / "none", "./none", "a/b/c"):
        message = refused(*own_policy(PROMPT), f"--policy={missing}")
        assert message.startswith(f"policy {missing} is missing: a Hugging Face folder or")
    assert not (tmp_path / "run").exists()
    message = refused(*own_policy(PROMPT), f"--policy={tmp_path}")
    assert message.startswith(f"no policy can be loaded from {tmp_path}: ")


@pytest.mark.parametrize(
    ("verifier", "share"),
    [("--data.verifier.pattern=(never)", "0%"), ("--data.verifier=test_cli.AlwaysRight", "100%")],
)
def test_no_group_with_variance(refused: Run, copy: Callable[..., Path], verifier: str, share: str) -> None:
    run_dir = copy(*STAGES[1:])
    message = refused(*arguments(run_dir), verifier)
    assert message.startswith(f"{run_dir / 'round-1' / 'rollouts'}: no response enters the loss")
    assert f"({share} of 128 are right)" in message


# Run directories


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--distill.kl_budget=0.02", "round-1/distill was made with distill.kl_budget: 0.01, not 0.02"),
        ("--seed_everything=1", "prepare was made with seed_everything: 0, not 1"),
        ("--task.layers=2", "prepare was made with task.layers: 1, not 2"),
        ("--data.group_size=4", "round-1/rollouts was made with data.group_size: 8, not 4"),
        (
            "--data.sampler.temperature=0.5",
            "round-1/rollouts was made with data.sampler.init_args.temperature: 1.0, not 0.5",
        ),
        (
            "--extreme_region_trainer.max_epochs=3",
            "round-1/extreme_region was made with extreme_region_trainer.max_epochs: 2, not 3",
        ),
        ("--data.baseline=batch", "round-1/extreme_region was made with data.baseline: group, not batch"),
        ("--unlearned.kl_coef=0.1", "round-1/unlearned was made with unlearned.kl_coef: 0.0, not 0.1"),
        ("--data.calibration_prompts=3", "round-1/distill was made with data.calibration_prompts: 4, not 3"),
        ("--data.validation_samples=3", "round-1/evaluation/base was made with data.validation_samples: 2, not 3"),
    ],
)
def test_a_run_directory_of_another_configuration(
    finished: tuple[Path, str], refused: Run, given: str, expected: str
) -> None:
    before = digests(finished[0])
    assert refused(*arguments(finished[0]), given).startswith(f"{finished[0]}/{expected}. Give another run_dir")
    assert digests(finished[0]) == before


def test_settings_that_make_no_difference_are_not_compared(finished: tuple[Path, str], run: Run) -> None:
    more = ["--trainer.log_every_n_steps=2", "--trainer.enable_progress_bar=true", "--data.max_tokens=9999"]
    more += ["--extreme_region.objective=erpd_lightning.SAPO"]  # the same class by another name
    assert run(*arguments(finished[0]), *more).count("done already") == 10


@pytest.mark.parametrize(
    ("store", "damage"),
    [("rollouts", "altered"), ("rollouts", "truncated"), ("signal/base", "lost"), ("signal/unlearned", "altered")],
)
def test_a_damaged_store(refused: Run, copy: Callable[..., Path], store: str, damage: str) -> None:
    run_dir = copy("distill", "evaluation")
    part = run_dir / "round-1" / store / "part-00000.parquet"
    content = part.read_bytes()
    middle = len(content) // 2
    if damage == "altered":
        part.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "truncated":
        part.write_bytes(content[:-50])
    else:
        part.unlink()
    expected = f"{part} is missing" if damage == "lost" else f"{part} was altered or truncated"
    assert refused(*arguments(run_dir)).startswith(expected)
    assert not (run_dir / "round-1" / "distill").exists()


def test_a_record_that_is_none(refused: Run, copy: Callable[..., Path]) -> None:
    record = copy() / "round-1" / "signal" / "stage.json"
    record.write_text(record.read_text()[:40])
    assert refused(*arguments(record.parents[2])).startswith(f"{record} is no readable record of a stage")


# What goes wrong on the way


def test_a_budget_out_of_reach_and_then_one_within(
    finished: tuple[Path, str], refused: Run, run: Run, copy: Callable[..., Path]
) -> None:
    run_dir = copy("distill", "evaluation")
    before = digests(run_dir)
    message = refused(*arguments(run_dir), "--distill.kl_budget=50")
    assert message.startswith("distill.kl_budget: a KL budget of 50 nats per token is out of reach")
    assert {name: digest for name, digest in digests(run_dir).items() if name in before} == before
    run(*arguments(run_dir), "--stage=distill")
    assert student(run_dir) == student(finished[0])


def test_a_callback_that_watches_what_nobody_logs(refused: Run, copy: Callable[..., Path]) -> None:
    callback = '{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/accuracy"}}'
    message = refused(*arguments(copy("distill", "evaluation")), f"--distill_trainer.callbacks={callback}")
    assert message == "EarlyStopping: no metric is called val/accuracy; docs/metrics.md lists those that are logged"


def test_a_loss_that_is_not_finite(refused: Run, copy: Callable[..., Path]) -> None:
    run_dir = copy(*STAGES[2:])
    wild = ["--extreme_region.learning_rate=1e30", "--checkpoint_every=1", "--stage=extreme_region"]
    message = refused(*arguments(run_dir), *wild)
    assert re.match(
        r"optimiser step 2: loss or gradient is not finite \(norm nan\); rows of the store: \d+, \d+.* "
        r"The last checkpoint is untouched",
        message,
    )
    folder = run_dir / "round-1" / "extreme_region"
    checkpoints = list((folder / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step=1.ckpt"]
    checkpoint = torch.load(checkpoints[0], weights_only=True)
    assert checkpoint["global_step"] == 1
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())
    assert not (folder / "teacher").exists()
    # What was begun is not taken over into another configuration without being told.
    assert "extreme_region was made with extreme_region.learning_rate: 1e+30, not 0.003" in refused(*arguments(run_dir))


def no_space(path: object = None) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_when_a_record_is_written(
    finished: tuple[Path, str], refused: Run, run: Run, copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = copy("distill", "evaluation")
    record = run_dir / "round-1" / "distill" / "stage.json"
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target) == record:
            raise no_space()
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert refused(*arguments(run_dir)).startswith(f"disk full while writing {record}: free some space")
    assert list(run_dir.rglob("*.tmp")) == []
    run(*arguments(run_dir), "--stage=distill")
    assert student(run_dir) == student(finished[0])


def test_a_disk_that_is_full_when_a_checkpoint_is_written(
    finished: tuple[Path, str], refused: Run, run: Run, copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the temporary directory is another disk, half of a checkpoint is left."""
    run_dir = copy("distill", "evaluation")
    folder = run_dir / "round-1" / "distill" / "checkpoints"
    move, moved = shutil.move, []

    def full(source: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        moved.append(target)
        if len(moved) == 2:
            content = Path(source).read_bytes()
            Path(target).write_bytes(content[: len(content) // 2])
            raise no_space()
        return move(source, target, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "move", full)
        assert refused(*arguments(run_dir)).startswith(f"disk full while writing {run_dir}: free some space")
    assert len(moved) == 2
    assert [path.name for path in folder.glob("*.ckpt")] == ["step=2.ckpt"]
    torch.load(folder / "step=2.ckpt", weights_only=True)
    run(*arguments(run_dir), "--stage=distill")
    assert len(moved) == 2
    assert student(run_dir) == student(finished[0])


def test_a_disk_that_is_full_when_a_policy_is_written(
    finished: tuple[Path, str], refused: Run, run: Run, copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = copy("distill", "evaluation")

    def full(self: Any, folder: Path, **_: Any) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        assert refused(*arguments(run_dir)).startswith(f"disk full while writing {run_dir}: free some space")
    assert not (run_dir / "round-1" / "distill" / "student").exists()
    run(*arguments(run_dir), "--stage=distill")
    assert student(run_dir) == student(finished[0])


def test_a_fast_dev_run_goes_through_all_stages(run: Run, copy: Callable[..., Path]) -> None:
    run_dir = copy(*STAGES[1:])
    out = run(*arguments(run_dir), "--trainer.fast_dev_run=true", "--data.sampler.batch_size=64")
    assert "[base] base: done already" in out
    steps = {
        stage: [path.name for path in (run_dir / "round-1" / stage / "checkpoints").glob("*.ckpt")]
        for stage in ("extreme_region", "unlearned", "distill")
    }
    assert list(steps.values()) == [["step=1.ckpt"]] * 3
    # What the stages share is whole: the two parts that 128 rollouts make.
    assert len(list((run_dir / "round-1" / "rollouts").glob("part-*.parquet"))) == 2


def test_an_error_of_ours_is_not_taken_for_one_of_the_users(
    run: Run, copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Rounds, *_: Any) -> None:
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(Rounds, "_evaluate", broken)
    with pytest.raises(KeyError, match="a mistake of ours"):
        run(*arguments(copy("evaluation")))
