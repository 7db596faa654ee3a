"""Options: what the command line accepts and shows, and how settings become modules and trainers."""

import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import EarlyStopping

from erpd_lightning import DistillModule, ExtremeRegionModule, RolloutDataModule
from erpd_lightning.callbacks import Throughput
from erpd_lightning.cli.options import BOUND_BY_CHAIN, CLASSES
from erpd_lightning.pipeline.rounds import STAGES as ALL_STAGES
from erpd_lightning.pipeline.rounds import Rounds
from support.chain import DEMO, arguments
from support.command_line import Run, with_yaml, write


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


@pytest.mark.parametrize("group", CLASSES)
def test_what_the_chain_fills_in_are_arguments(group: str) -> None:
    """A name that is none would leave the argument that it stood for open to the user, and then pass over it."""
    kinds = [kind for kind in CLASSES[group].__mro__ if "__init__" in vars(kind)]
    arguments_there_are = {name for kind in kinds for name in inspect.signature(kind).parameters}
    assert BOUND_BY_CHAIN[group] <= arguments_there_are


def test_several_rewards_are_configured_by_class_path(chain: Any, tmp_path: Path) -> None:
    rewards = {
        "correct": {"verifier": {"class_path": "erpd_lightning.data.verifiers.MathVerify"}},
        "short": {"verifier": {"class_path": "support.verifiers.Short"}, "weight": 0.1},
    }
    given = {"class_path": "erpd_lightning.data.verifiers.WeightedRewards", "init_args": {"rewards": rewards}}
    built = chain(*arguments(tmp_path / "run"), f"--data.verifier={json.dumps(given)}")
    verifier = built.builder.data(store="", tokenizer="").verifier
    assert verifier.part_names == ["correct", "short"]
    assert [reward.weight for reward in verifier.rewards.values()] == [1.0, 0.1]
    written = verifier.settings()["rewards"]["short"]
    assert written["weight"] == 0.1
    assert written["verifier"] == {"class": "support.verifiers.Short"}
