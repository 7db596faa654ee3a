"""The trainer's own log-probs beside those of another engine: stored part by part, and what training takes of them."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from erpd_lightning.data.rescoring import RESCORED, logp_gap, rescored_store
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samplers import Response, TransformersSampler
from erpd_lightning.data.store import LOGPS, ROLLOUTS, Store, StoreWriter
from erpd_lightning.errors import InvalidArgument, UserError
from erpd_lightning.models.policy import load_policy
from support.policies import make_model, make_rows, token_logps
from support.rollouts import sample
from support.trainers import run_prediction


class Elsewhere(TransformersSampler):
    """An engine whose log-probs are a little off."""

    needs_model = False

    @contextmanager
    def serving(self, policy: str | Path, folder: Path, device: int | None = None) -> Iterator[None]:
        self._model = load_policy(policy).model
        yield

    def sample(self, model: Any, *args: Any, **kwargs: Any) -> list[Response]:
        return [
            Response(each.ids, [logp - 0.25 * (i % 3) for i, logp in enumerate(each.logps)], each.finish_reason)
            for each in super().sample(self._model, *args, **kwargs)
        ]


@pytest.fixture
def data(make_data: Callable[..., RolloutDataModule], policy: Path) -> RolloutDataModule:
    """Sampled elsewhere, at another temperature than 1."""
    made = make_data(sampler=Elsewhere(8, temperature=0.7, batch_size=8), max_tokens=40)
    sample(made, policy)
    return made


def rescore(data: RolloutDataModule, policy: Path, world_size: int = 1) -> Store:
    for rank in reversed(range(world_size)):
        run_prediction(data.rescoring(), policy, rank, world_size)
    return Store.open(data.store / RESCORED)


def test_the_trainer_computes_them_at_the_temperature_of_the_rollouts(data: RolloutDataModule, policy: Path) -> None:
    rescored = rescore(data, policy)
    rows, model = Store.open(data.store).table().to_pylist(), make_model()
    assert rescored.table()["row"].to_pylist() == list(range(len(rows)))
    assert [part["rows"] for part in rescored.parts] == [8, 8, 8]
    for row, logps in zip(rows, rescored.table()["logps"].to_pylist(), strict=True):
        ids = torch.tensor(row["response_ids"])[:, None]
        expected = token_logps(model, row["prompt_ids"], row["response_ids"], temperature=0.7).gather(1, ids)[:, 0]
        assert logps == pytest.approx(expected.tolist(), abs=1e-5)
        assert row["logps"] == pytest.approx([logp - 0.25 * (i % 3) for i, logp in enumerate(logps)], abs=1e-5)


def test_they_depend_on_no_rank(data: RolloutDataModule, policy: Path) -> None:
    alone = rescore(data, policy).fingerprint
    for path in (data.store / RESCORED).iterdir():
        path.unlink()
    assert rescore(data, policy, world_size=3).fingerprint == alone


def test_training_takes_the_trainers_and_keeps_the_samplers(data: RolloutDataModule, policy: Path) -> None:
    before = data.rollouts
    assert before.trainer_logps is before.logps
    rescored = rescore(data, policy).table()["logps"].to_pylist()
    data.clear_cache()
    table = data.rollouts
    assert torch.equal(table.logps, before.logps)
    assert table.trainer_logps.tolist() == [logp for row in rescored for logp in row]
    rows = torch.tensor([5, 0, 9])
    batch = table.batch(rows, torch.zeros(24), step_tokens=1, step_responses=3, last=True)
    for i, row in enumerate(rows.tolist()):
        assert batch.trainer_logps[i][batch.mask[i]].tolist() == rescored[row]
    assert bool((batch.trainer_logps[~batch.mask] == 0).all())
    assert not torch.equal(batch.trainer_logps, batch.sampler_logps)


@pytest.mark.parametrize(
    ("rescore", "sampler", "expected"),
    [
        ("auto", TransformersSampler, False),
        ("auto", Elsewhere, True),
        ("always", TransformersSampler, True),
        ("never", Elsewhere, False),
    ],
)
def test_when_they_are_computed(
    make_data: Callable[..., RolloutDataModule], rescore: str, sampler: type[TransformersSampler], expected: bool
) -> None:
    assert make_data(rescore=rescore, sampler=sampler(8)).rescores == expected


def test_another_choice_is_refused(make_data: Callable[..., RolloutDataModule]) -> None:
    with pytest.raises(InvalidArgument, match="rescore is 'sometimes': it must be auto, always or never"):
        make_data(rescore="sometimes")


def test_another_policy_is_refused(data: RolloutDataModule, other_policy: Path) -> None:
    with pytest.raises(UserError, match=r"rollouts was sampled from another policy than .*other"):
        rescore(data, other_policy)


def test_those_of_other_rollouts_are_refused(data: RolloutDataModule, policy: Path) -> None:
    writer = StoreWriter(data.store / RESCORED, LOGPS, {"rollouts": "others"})
    writer.write_part(0, {"row": [0], "logps": [[-1.0]]})
    writer.finish(1)
    with pytest.raises(UserError, match="rescored holds the log-probs of other rollouts"):
        rescored_store(Store.open(data.store))


def stores(folder: Path, sampler: Sequence[Any], trainer: Sequence[Any]) -> tuple[Store, Store]:
    """Rollouts in two parts, and the trainer's log-probs of them in one."""
    made = make_rows(groups=1, group_size=2)[0]
    rows = [{**made, "response_ids": [3] * len(logps), "logps": logps} for logps in sampler]
    writer = StoreWriter(folder / "rollouts", ROLLOUTS, {})
    for index, part in enumerate((rows[:1], rows[1:])):
        writer.write_part(index, {name: [row[name] for row in part] for name in ROLLOUTS.names})
    rollouts = writer.finish(2)
    writer = StoreWriter(folder / "rescored", LOGPS, {})
    writer.write_part(0, {"row": range(len(trainer)), "logps": trainer})
    return rollouts, writer.finish(1)


@pytest.mark.parametrize("tokens", [1, 999, 1000, 4321])
def test_the_gap_is_that_of_all_tokens_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr("erpd_lightning.data.rescoring.ROWS_AT_A_TIME", 3)
    rng = np.random.default_rng(0)
    sampler, trainer = -rng.exponential(size=(2, tokens)).astype(np.float32)
    cuts = np.sort(rng.integers(0, tokens + 1, 10))
    cut = [[part.tolist() for part in np.split(logps, cuts)] for logps in (sampler, trainer)]
    gap = logp_gap([stores(tmp_path, *cut)])
    differences = np.sort(np.abs(sampler - trainer))
    assert gap.tokens == tokens
    assert gap.mean == pytest.approx(differences.mean(dtype=np.float64))
    assert gap.worst == differences[-1]
    assert (differences > gap.p999).sum() == tokens // 1000
    assert math.isfinite(gap.p999)
