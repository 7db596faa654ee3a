"""The run's data type and precision in every stage of a smallest chain, and in the commands after it."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from erpd_lightning.data.samplers.decoding import PolicyReader
from erpd_lightning.data.store import Store
from erpd_lightning.models import policy as policies
from erpd_lightning.models.policy import Policy
from erpd_lightning.pipeline.stages import Stages
from support.chain import arguments, parsers_built_once
from support.command_line import printed

AUTO = '{"class_path": "erpd_lightning.AutoSignal", "init_args": {"prompts": 4, "samples": 1}}'
STAGES = ("rollouts", "extreme_region", "unlearned", "scoring", "signal_selection", "distill", "evaluation")


class Seen:
    """What policies were loaded with and asked in, by stage or command."""

    def __init__(self) -> None:
        self.now = ""
        self.loaded: dict[str, set[torch.dtype]] = defaultdict(set)
        self.asked: dict[str, set[tuple[str, torch.dtype, bool]]] = defaultdict(set)

    def note(self, what: str, weight: torch.Tensor) -> None:
        self.asked[self.now].add((what, weight.dtype, torch.is_autocast_enabled("cpu")))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Notes every policy that is loaded, every one that samples and every one that is asked for hidden states."""
    found = Seen()

    def noted(owner: Any, name: str, note: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            note(*args)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    # In the place of the check, which asks each policy when it is loaded, outside of any trainer.
    monkeypatch.setattr(
        policies, "check_policy", lambda policy, path: found.loaded[found.now].add(policy.head.weight.dtype)
    )
    noted(Policy, "hidden", lambda policy, batch: found.note("asked", policy.head.weight))
    noted(PolicyReader, "__call__", lambda reader, ids: found.note("sampled", next(reader._model.parameters())))
    noted(Stages, "run", lambda self, stage, *_: setattr(found, "now", stage))
    return found


@pytest.fixture(autouse=True, scope="module")
def _parsers_are_built_once() -> Iterator[None]:
    with parsers_built_once():
        yield


def logps(store: Path) -> torch.Tensor:
    """The stored log-probs of the sampled tokens."""
    return torch.tensor(Store.open(store).table()["logps"].combine_chunks().values.to_numpy())


def run_all(seen: Seen, capsys: pytest.CaptureFixture[str], run_dir: Path, **settings: Any) -> None:
    """The chain, then a preview and a test of its student."""
    settings = {"distill.signal": AUTO, "data.validation_samples": 1, **settings}
    for command in ("fit", "preview", "test"):
        seen.now = command
        printed(capsys, *arguments(run_dir, command, **settings))


def test_every_stage_loads_the_weights_in_the_data_type(
    seen: Seen, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_all(seen, capsys, tmp_path / "run", dtype="float64")
    assert seen.loaded.keys() == {"base", *STAGES, "preview", "test"}
    for stage in (*STAGES, "preview", "test"):
        assert seen.loaded[stage] == {torch.float64}, stage
        assert {dtype for _, dtype, _ in seen.asked[stage]} == {torch.float64}, stage
    for store in ("rollouts", "scoring/teacher"):
        assert logps(tmp_path / "run" / "round-1" / store).dtype == torch.float32


def test_every_stage_computes_in_the_precision(seen: Seen, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run_all(seen, capsys, tmp_path / "run", **{"trainer.precision": "bf16-mixed"})
    for stage in (*STAGES, "preview", "test"):
        assert {(dtype, autocast) for _, dtype, autocast in seen.asked[stage]} == {(torch.float32, True)}, stage
    for store in ("rollouts", "scoring/teacher"):
        found = logps(tmp_path / "run" / "round-1" / store)
        assert not torch.equal(found, found.bfloat16().float())


def test_what_a_policy_answers_while_it_is_trained_is_sampled_in_the_precision(
    seen: Seen, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Otherwise its importance ratios would not begin at 1."""
    settings = {"last_stage": "extreme_region", "data.iterations": 2, "trainer.precision": "bf16-mixed"}
    printed(capsys, *arguments(tmp_path / "run", **settings))
    assert seen.asked["extreme_region"] == {(what, torch.float32, True) for what in ("asked", "sampled")}
