"""Predictions: what their stores hold, on any number of ranks and after any interruption."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from erpd_lightning.data.predict_data import PredictToStore
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samplers import TransformersSampler
from erpd_lightning.data.store import SCORES, Store
from erpd_lightning.errors import UserError
from erpd_lightning.modules import scoring
from erpd_lightning.modules.extreme_region import ExtremeRegionModule
from erpd_lightning.modules.policy_module import PolicyModule
from support.policies import TASK, VOCABULARY_SIZE, make_model, token_logps
from support.rollouts import GROUP_SIZE, PROMPTS, Counting, sample, write_made_up
from support.trainers import fake_trainer, make_predictor, make_trainer, run_prediction, score
from support.verifiers import Constant, EvenEnd

# Sampling


def test_the_store_holds_what_was_sampled(make_data: Callable[..., RolloutDataModule], policy: Path) -> None:
    data = make_data()
    make_trainer().predict(PolicyModule(policy, references={}), datamodule=data.sampling(), return_predictions=False)
    rows = Store.open(data.store).table().to_pylist()
    assert [(row["group"], row["sample"]) for row in rows] == [
        (group, number) for group in range(len(PROMPTS)) for number in range(GROUP_SIZE)
    ]
    model, tokenizer = make_model(), TASK.tokenizer()
    for row in rows:
        assert (row["prompt"], row["answer"]) == PROMPTS[row["group"]]
        assert tokenizer.decode(row["prompt_ids"]) == row["prompt"]
        response = row["response_ids"]
        assert row["response"] == tokenizer.decode([token for token in response if token > 2])
        assert row["finish_reason"] == ("stop" if response[-1] == 2 else "length")
        reward = EvenEnd.check(row["response"])
        assert (row["reward"], row["checked"]) == (reward or 0.0, reward is not None)
        logps = token_logps(model, row["prompt_ids"], response)
        expected = logps.gather(1, torch.tensor(response)[:, None])[:, 0]
        assert row["logps"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert len({tuple(row["response_ids"]) for row in rows}) > len(rows) // 2
    assert {row["checked"] for row in rows} == {row["reward"] == 1.0 for row in rows} == {True, False}


def test_the_store_depends_on_no_rank(make_data: Callable[..., RolloutDataModule], policy: Path) -> None:
    alone = sample(make_data("alone"), policy)
    data = make_data("pair")
    run_prediction(data.sampling(), policy, 1, 2)
    assert [path.name for path in data.store.iterdir()] == ["part-00001.parquet"]
    pair = sample(data, policy, ranks=(0,), world_size=2)
    # Three parts of two prompts each: one rank of four has nothing to do.
    four = sample(make_data("four"), policy, ranks=(3, 1, 2, 0), world_size=4)
    assert [part["rows"] for part in alone.parts] == [8, 8, 8]
    assert alone.fingerprint == pair.fingerprint == four.fingerprint
    assert alone.table().equals(four.table())


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"sampler": TransformersSampler(7, batch_size=8)},
        {"sampler": TransformersSampler(8, temperature=0.9, batch_size=8)},
        {"verifier": Constant(1.0)},
        {"group_size": 2},
        {"prompts_per_round": 3},
        {"prompts_per_round": 3, "round": 2},
    ],
)
def test_the_fingerprint_tells_settings_apart(
    make_data: Callable[..., RolloutDataModule], policy: Path, change: dict[str, Any]
) -> None:
    store, other = sample(make_data("a"), policy), sample(make_data("b", **change), policy)
    assert store.metadata != other.metadata
    assert store.fingerprint != other.fingerprint


def test_policies_and_rounds_sample_differently(
    make_data: Callable[..., RolloutDataModule], policy: Path, other_policy: Path
) -> None:
    store, other = sample(make_data("a"), policy), sample(make_data("b"), other_policy)
    assert store.metadata != other.metadata
    assert not store.table()["response_ids"].equals(other.table()["response_ids"])


def test_a_killed_prediction_goes_on(make_data: Callable[..., RolloutDataModule], policy: Path) -> None:
    whole = sample(make_data("whole"), policy)
    data = make_data("killed")
    killed = sample(data, policy, ranks=(1, 0), world_size=2)
    for file in ("manifest.json", "part-00001.parquet"):
        (killed.path / file).unlink()
    kept = (killed.path / "part-00000.parquet").stat().st_mtime_ns
    data.sampler = Counting(8, batch_size=8)
    data.sampler.__class__.__qualname__ = TransformersSampler.__qualname__
    Counting.drawn = 0
    assert sample(data, policy).fingerprint == whole.fingerprint
    assert Counting.drawn == 8
    assert (killed.path / "part-00000.parquet").stat().st_mtime_ns == kept


def test_a_prediction_killed_before_its_manifest_is_finished(
    make_data: Callable[..., RolloutDataModule], policy: Path
) -> None:
    data = make_data()
    fingerprint = sample(data, policy).fingerprint
    (data.store / "manifest.json").unlink()
    module = PolicyModule(policy, references={})
    make_trainer().predict(module, datamodule=data.sampling(), return_predictions=False)
    assert Store.open(data.store).fingerprint == fingerprint
    # And a finished one stays as it is.
    make_trainer().predict(module, datamodule=data.sampling(), return_predictions=False)
    assert Store.open(data.store).fingerprint == fingerprint


def test_a_finished_store_is_not_another_policys(
    make_data: Callable[..., RolloutDataModule], policy: Path, other_policy: Path
) -> None:
    fingerprint = sample(make_data(), policy).fingerprint
    with pytest.raises(UserError, match="other settings"):
        sample(make_data(), other_policy)
    assert Store.open(make_data().store).fingerprint == fingerprint


@pytest.mark.parametrize("file", ["part-00001.parquet", "manifest.json"])
@pytest.mark.parametrize("damage", ["altered", "truncated"])
def test_a_damaged_store_is_refused(
    make_data: Callable[..., RolloutDataModule], policy: Path, file: str, damage: str
) -> None:
    data = make_data()
    path = sample(data, policy).path / file
    content = bytearray(path.read_bytes())
    if damage == "altered":
        content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "altered" else content[:-9])
    with pytest.raises(UserError, match=file):
        make_trainer(max_epochs=1).fit(ExtremeRegionModule(policy), datamodule=make_data())


# Scores


def smallest_support(logps: torch.Tensor, mass: float) -> list[int]:
    kept, held = [], 0.0
    for index in logps.argsort(descending=True).tolist():
        if held >= mass:
            break
        kept.append(index)
        held += float(logps[index].exp())
    return kept


def check_scores(store: Store, rows: list[dict[str, Any]], model: Any, base: Any) -> None:
    """Against both policies' full distributions, token by token."""
    stored = {row["row"]: row for row in store.table().to_pylist()}
    assert len(stored) == store.rows == len(rows)
    sizes = set()
    for number, row in enumerate(rows):
        own, entry = stored[number], 0
        logps = token_logps(model, row["prompt_ids"], row["response_ids"]).detach()
        base_logps = token_logps(base, row["prompt_ids"], row["response_ids"]).detach()
        for t, token in enumerate(row["response_ids"]):
            assert own["logps"][t] == pytest.approx(float(logps[t, token]), abs=1e-5)
            size = own["support_size"][t]
            ids = own["support_ids"][entry : entry + size]
            assert sorted(ids) == sorted(smallest_support(base_logps[t], 0.9))
            expected = logps[t][ids].tolist()
            assert own["support_logps"][entry : entry + size] == pytest.approx(expected, abs=1e-5)
            rest = [v for v in range(VOCABULARY_SIZE) if v not in ids]
            assert own["tail_logps"][t] == pytest.approx(float(logps[t][rest].logsumexp(0)), abs=1e-4)
            entry += size
            sizes.add(size)
        assert entry == len(own["support_ids"])
    assert len(sizes) > 3


def test_scores_are_the_policies_log_probs(
    make_data: Callable[..., RolloutDataModule],
    policy: Path,
    other_policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scoring, "SUPPORT_MASS", 0.9)
    rows = write_made_up(tmp_path / "rollouts")
    data = make_data(scores=tmp_path / "scores", max_tokens=40)
    trainer = make_trainer()
    trainer.predict(PolicyModule(policy, references={}), datamodule=data.scoring("base"), return_predictions=False)
    base, teacher = Store.open(tmp_path / "scores" / "base"), score(data, "teacher", other_policy)
    check_scores(base, rows, make_model(), make_model())
    check_scores(teacher, rows, make_model(seed=1), make_model())
    assert base.schema == SCORES.metadata[b"name"].decode()
    assert set(data.rollouts.scores) == {"base", "teacher"}


def interrupted(data: PredictToStore, policy: Path, parts: int) -> None:
    """A prediction that dies after some parts."""
    data.trainer = fake_trainer()
    module = make_predictor(policy)
    data.connect(module)
    for batch in list(data.predict_dataloader())[:parts]:
        data.write(batch, module.predict_step(batch, 0))


def test_scores_depend_on_no_rank_and_no_interruption(
    make_data: Callable[..., RolloutDataModule],
    policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("erpd_lightning.data.predict_data.PART_TOKENS", 50)
    write_made_up(tmp_path / "rollouts")
    alone = score(make_data(scores=tmp_path / "alone"), "base", policy)
    assert len(alone.parts) > 2
    pair = make_data(scores=tmp_path / "pair")
    for rank in (1, 0):
        run_prediction(pair.scoring("base"), policy, rank, 2)
    assert Store.open(tmp_path / "pair" / "base").fingerprint == alone.fingerprint
    killed = make_data(scores=tmp_path / "killed")
    interrupted(killed.scoring("base"), policy, parts=2)
    assert not Store.exists(tmp_path / "killed" / "base")
    assert killed.rollouts.scores == {}
    assert score(killed, "base", policy).fingerprint == alone.fingerprint
    assert set(killed.rollouts.scores) == {"base"}


def test_scoring_goes_on_within_less_memory(
    make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("erpd_lightning.data.predict_data.PART_TOKENS", 80)
    rows = write_made_up(tmp_path / "rollouts")
    scores = tmp_path / "scores"
    interrupted(make_data(scores=scores, max_tokens=80).scoring("base"), policy, parts=1)
    data = make_data(scores=scores, max_tokens=20)
    base = data.scoring("base")
    parts = [base.part(index) for index in range(base.part_count())]
    assert max(batch.input_ids.numel() for part in parts for batch in part.batches) <= 20
    score(data, "base", policy)
    assert data.rollouts.scores["base"].rows.tolist() == list(range(len(rows)))
    # Nor is a finished store in the way of another memory limit.
    assert score(make_data(scores=scores, max_tokens=30), "base", policy).rows == len(rows)


def test_scores_of_other_rollouts_are_refused(
    make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path
) -> None:
    write_made_up(tmp_path / "rollouts")
    write_made_up(tmp_path / "others", reward={1: 1.0})
    score(make_data(scores=tmp_path / "scores"), "base", policy)
    data = make_data("others", scores=tmp_path / "scores")
    with pytest.raises(UserError, match="scores other rollouts"):
        _ = data.rollouts
    with pytest.raises(UserError, match="other settings"):
        score(data, "base", policy)


def test_the_base_is_scored_first(make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path) -> None:
    write_made_up(tmp_path / "rollouts")
    data = make_data(scores=tmp_path / "scores")
    with pytest.raises(UserError, match="score the policy 'base' first"):
        data.scoring("teacher")
    with pytest.raises(UserError, match="directory for the scores"):
        make_data().scoring("base")


def test_a_policy_of_another_vocabulary_is_not_asked(
    make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path
) -> None:
    write_made_up(tmp_path / "rollouts")
    data = make_data(scores=tmp_path / "scores")
    score(data, "base", policy)
    stranger = shutil.copytree(policy, tmp_path / "stranger")
    tokenizer = (stranger / "tokenizer.json").read_text()
    (stranger / "tokenizer.json").write_text(tokenizer.replace('"7"', '"x"'))
    with pytest.raises(UserError, match=r"stranger has another vocabulary than .*'teacher' cannot be asked"):
        score(data, "teacher", stranger)
    for path in stranger.glob("tokenizer*"):  # Weights alone: there is nothing to compare.
        path.unlink()
    score(data, "teacher", stranger)
