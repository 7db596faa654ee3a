"""Policies, scored rollouts and prompts that tests of the modules share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.modules import scoring
from support.modules import NAMES, PROMPTS, SAMPLES, Recorder, make_data
from support.policies import make_rows, save_policies, write_prompts, write_rollouts
from support.trainers import score
from support.verifiers import EvenEnd


@pytest.fixture(scope="session")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Policies of four seeds by name."""
    return save_policies(tmp_path_factory.mktemp("policies"), *NAMES)


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    return make_rows(groups=4, group_size=4)


@pytest.fixture(scope="session")
def scored(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], policies: dict[str, str]) -> Path:
    """A store and scores of three policies on it, over almost all of the vocabulary."""
    folder = tmp_path_factory.mktemp("scored")
    write_rollouts(folder / "rollouts", rows)
    data = make_data(folder, policies, scores=folder / "scores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "SUPPORT_MASS", 1.0)
        for name in NAMES[:3]:
            score(data, name, policies[name])
    return folder


@pytest.fixture
def evaluation_data(tmp_path: Path, policies: dict[str, str]) -> Callable[..., RolloutDataModule]:
    prompts = write_prompts(tmp_path / "prompts.jsonl", [(prompt, "?") for prompt in PROMPTS])

    def make(folder: Path = tmp_path, **settings: Any) -> RolloutDataModule:
        defaults: dict[str, Any] = {
            "validation_prompts": prompts,
            "validation_samples": SAMPLES,
            "sampler": Recorder(),
            "verifier": EvenEnd(),
            "max_tokens": 50,
        }
        return make_data(folder, policies, **{**defaults, **settings})

    return make
