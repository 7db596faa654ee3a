"""Every file in configs/ is one that the command line takes."""

import sys
from pathlib import Path

import pytest
import yaml

from erpd_lightning.cli.main import main
from erpd_lightning.pipeline.rounds import Rounds
from support.chain import DEMO

CONFIGS = DEMO.parent
PRESETS = {CONFIGS / f"{name}.yaml" for name in ("gsm8k_qwen3_0.6b", "polaris_qwen3_4b")}
"""What needs a real model and data set: test_presets.py runs them on others."""

FILES = sorted({*CONFIGS.rglob("*.yaml")} - PRESETS)
ON_TOP = ("smoke", "auto", "replay", "watched")
OVERRIDES = {CONFIGS / f"{name}.yaml" for name in ON_TOP} | {*(CONFIGS / "baselines").glob("*")}
"""What only goes on top of the demo."""


def fit(monkeypatch: pytest.MonkeyPatch, *args: object) -> Rounds:
    """The chain that `fit` would run."""
    found: list[Rounds] = []
    monkeypatch.setattr(Rounds, "run", lambda self: found.append(self))
    monkeypatch.setattr(sys, "argv", ["erpd_lightning", "fit", *map(str, args)])
    main()
    return found[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_shipped_configuration_is_complete(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = ["--config", DEMO] if path in OVERRIDES else []
    rounds = fit(monkeypatch, *base, "--config", path, "--run_dir", tmp_path)
    assert "seed_everything" in yaml.safe_load((DEMO if base else path).read_text())
    for stage in ("extreme_region", "unlearned", "distill"):
        # Lightning's own default would be 1,000 epochs.
        epochs = rounds.builder.trainer(stage).max_epochs
        assert epochs is not None
        assert 1 <= epochs < 100


def test_the_smoke_run_is_the_demo_made_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    demo = fit(monkeypatch, "--config", DEMO, "--run_dir", tmp_path / "demo")
    smoke = fit(monkeypatch, "--config", DEMO, "--config", CONFIGS / "smoke.yaml", "--run_dir", tmp_path / "smoke")
    assert smoke.rounds == demo.rounds
    kinds = [type(rounds.builder.module("distill", policy="")) for rounds in (demo, smoke)]
    assert kinds[0] is kinds[1]
    sizes = [rounds.builder.data(store="", tokenizer="") for rounds in (demo, smoke)]
    rollouts = [(data.prompts_per_round or 0) * data.group_size for data in sizes]
    assert rollouts[0] == 4096
    assert 0 < rollouts[1] <= 512


def test_loggers_that_stages_share_tell_them_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each stage counts its steps from 0; a prefix or a logger of the user's own stays as it is."""

    def headers(*args: str) -> set[str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder}", *args]
        rounds = fit(monkeypatch, "--config", DEMO, "--run_dir", tmp_path / "run", *logger)
        for stage in ("extreme_region", "distill"):
            trainer = rounds.builder.trainer(stage, default_root_dir=tmp_path / "run" / "round-2" / stage)
            assert trainer.logger is not None
            trainer.logger.log_metrics({"val/x": 1.0}, step=0)
            trainer.logger.save()
        lines = [path.read_text().splitlines()[0] for path in folder.rglob("metrics.csv")]
        return {name for line in lines for name in line.split(",")} - {"step"}

    assert headers() == {"round-2/extreme_region-val/x", "round-2/distill-val/x"}
    assert headers("--trainer.logger.prefix=mine") == {"mine-val/x"}
