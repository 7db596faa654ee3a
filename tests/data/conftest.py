"""A policy or two, and a data module with prompts that are sampled, scored and trained on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samplers import TransformersSampler
from support.policies import save_policy, write_prompts
from support.rollouts import GROUP_SIZE, PROMPTS
from support.verifiers import EvenEnd


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policies") / "base")


@pytest.fixture(scope="module")
def other_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policies") / "other", seed=1)


@pytest.fixture
def make_data(tmp_path: Path, policy: Path) -> Callable[..., RolloutDataModule]:
    prompts = write_prompts(tmp_path / "prompts.jsonl", PROMPTS)

    def make(store: str = "rollouts", **settings: Any) -> RolloutDataModule:
        defaults: dict[str, Any] = {
            "tokenizer": policy,
            "prompts": prompts,
            "sampler": TransformersSampler(8, batch_size=8),
            "verifier": EvenEnd(),
            "group_size": GROUP_SIZE,
            "seed": 3,
        }
        return RolloutDataModule(tmp_path / store, **{**defaults, **settings})

    return make
