"""The audit of rollouts counts what a slow and obvious reading of the rows counts."""

import random
import tracemalloc
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from erpd_lightning.data.audit import audit
from erpd_lightning.data.rescoring import RESCORED
from erpd_lightning.data.store import LOGPS, ROLLOUTS, StoreWriter
from erpd_lightning.errors import UserError
from support.policies import make_rows, write_rollouts


def drawn(seed: int) -> list[dict[str, Any]]:
    """Rollouts of every kind, in no order: short ones that repeat, truncated, unscorable, empty and graded ones."""
    rng = random.Random(seed)
    rows = make_rows(groups=7, group_size=5, seed=seed)
    for row in rows:
        row["response_ids"] = rng.choice([[3], [4], [3, 4], [5] * rng.randint(1, 9), row["response_ids"]])
        row["logps"] = [-1.0] * len(row["response_ids"])
        row["reward"] = rng.choice([-1.0, 0.0, 0.5, 1.0])
        row["checked"] = rng.random() < 0.8
        row["finish_reason"] = rng.choice(["stop", "length"])
        row["response"] = rng.choice(["", " \n", "7", "x "])
    rng.shuffle(rows)
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_counts(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erpd_lightning.data.audit.ROWS_AT_A_TIME", 4)
    rows = drawn(seed)
    found = audit([write_rollouts(tmp_path / "store", rows)], correct_threshold=0.5)
    checked = [row for row in rows if row["checked"]]
    assert (found.responses, found.groups) == (35, 7)
    assert found.correct == pytest.approx(fmean(row["reward"] >= 0.5 for row in checked))
    assert found.mean_reward == pytest.approx(fmean(row["reward"] for row in checked))
    assert found.truncated == pytest.approx(fmean(row["finish_reason"] == "length" for row in rows))
    assert found.unscorable == pytest.approx(1 - len(checked) / 35)
    assert found.empty == pytest.approx(fmean(row["response"].strip() == "" for row in rows))
    distinct = {(row["group"], *row["response_ids"]) for row in rows}
    assert 0 < len(distinct) < 35
    assert found.duplicate == pytest.approx(1 - len(distinct) / 35)
    rewards = defaultdict(list)
    for row in checked:
        rewards[row["group"]].append(row["reward"])
    assert found.mixed_groups == sum(len(set(each)) > 1 for each in rewards.values())
    assert found.measure("uniform") == pytest.approx(1 - found.mixed_groups / 7)
    shares = [fmean(reward >= 0.5 for reward in each) for each in rewards.values()]
    assert sum(part.prompts for part in found.by_prompt) == len(shares)
    for part in found.by_prompt:
        inside = [s for s in shares if s == part.above == part.up_to or (part.above < s <= part.up_to and s < 1)]
        assert part.prompts == len(inside)


def test_lengths(tmp_path: Path) -> None:
    rows = drawn(0)
    found = audit([write_rollouts(tmp_path / "store", rows)])
    lengths = sorted(len(row["response_ids"]) for row in rows)
    assert found.mean_length == pytest.approx(fmean(lengths))
    assert found.length_percentiles["50"] == lengths[17]
    assert found.longest == lengths[-1]
    assert [part.responses for part in found.by_length] == [7] * 5
    assert found.by_length[0].shortest == lengths[0]
    assert found.by_length[-1].longest == lengths[-1]
    rows = sorted(rows, key=lambda row: len(row["response_ids"]))
    for number, part in enumerate(found.by_length):
        rewards = [row["reward"] for row in rows[7 * number : 7 * number + 7] if row["checked"]]
        assert part.mean_reward == pytest.approx(fmean(rewards))


def test_the_groups_of_several_stores_are_apart(tmp_path: Path) -> None:
    stores = [write_rollouts(tmp_path / str(seed), make_rows(groups=3, seed=0)) for seed in range(2)]
    one, two = audit(stores[:1]), audit(stores)
    assert (two.responses, two.groups, two.mixed_groups) == (24, 6, 2 * one.mixed_groups)
    assert two.duplicate == one.duplicate


def test_the_gap_of_what_was_computed_once_more(tmp_path: Path) -> None:
    rows = make_rows(groups=2)
    store = write_rollouts(tmp_path / "store", rows)
    assert audit([store]).sampler_gap is None
    writer = StoreWriter(store.path / RESCORED, LOGPS, {"rollouts": store.fingerprint})
    writer.write_part(0, {"row": range(8), "logps": [[x + 0.125 for x in row["logps"]] for row in rows]})
    writer.finish(1)
    gap = audit([store]).sampler_gap
    assert gap is not None
    assert (gap.mean, gap.worst) == (pytest.approx(0.125, abs=1e-6), pytest.approx(0.125, abs=1e-6))
    assert audit([store]).exceeded({"gap": 0.1, "truncated": 0.0}) == [
        "0.125 nats a token lie between the log-probs of sampler and trainer, on average (threshold: 0.1)"
    ]


def test_a_store_without_responses_is_refused(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, ROLLOUTS, {})
    writer.write_part(0, ROLLOUTS.empty_table())
    with pytest.raises(UserError, match="holds no responses"):
        audit([writer.finish(1)])


def test_all_that_could_not_be_checked(tmp_path: Path) -> None:
    rows = [{**row, "checked": False} for row in make_rows(groups=2)]
    found = audit([write_rollouts(tmp_path / "store", rows)])
    assert (found.correct, found.mean_reward, found.mixed_groups, found.unscorable) == (None, None, 0, 1.0)
    assert sum(part.prompts for part in found.by_prompt) == 0


def test_memory_does_not_grow_with_the_tokens(tmp_path: Path) -> None:
    made = make_rows(groups=1, group_size=4)[0]
    writer = StoreWriter(tmp_path / "store", ROLLOUTS, {})
    row = {**made, "response_ids": [3] * 4096, "logps": [-1.0] * 4096}
    for index in range(40):
        writer.write_part(index, {name: [row[name]] * 64 for name in ROLLOUTS.names})
    store = writer.finish(40)
    tokens = 40 * 64 * 4096
    tracemalloc.start()
    assert audit([store]).mean_length == 4096
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < tokens  # a fourth of what the ids take
