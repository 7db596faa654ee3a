"""Stored rollouts with other verdicts: what changes, what does not, and what goes on after a kill."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from erpd_lightning.data.reward_parts import read_parts
from erpd_lightning.data.store import ROLLOUTS, SCORES, Store, StoreWriter
from erpd_lightning.data.verifiers import ExactMatch, Verifier, WeightedReward, WeightedRewards
from erpd_lightning.data.verify_again import verify_again
from erpd_lightning.errors import UserError
from support.policies import TASK, make_rows

METADATA = {"policy": "abc", "seed": 3, "verifier": ["Old", {}]}


class Noting(Verifier):
    """Rewards what a test says, and notes what it is asked."""

    def __init__(self, **rewards: float | None) -> None:
        self.rewards = rewards
        self._asked: list[tuple[str, str, str]] = []

    def verify(self, prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str]) -> Any:
        self._asked += zip(prompts, responses, answers, strict=True)
        return super().verify(prompts, responses, answers)

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        return [self.rewards.get(response, 0.0) for response in responses]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    rows = make_rows(groups=3, group_size=2)
    verdicts = [(1.0, True), (0.0, True), (0.0, False), (0.0, False), (1.0, True), (0.5, True)]
    writer = StoreWriter(tmp_path / "store", ROLLOUTS, METADATA)
    for number, (row, (reward, checked)) in enumerate(zip(rows, verdicts, strict=True)):
        row |= {"prompt": f"p{number}", "response": f"r{number}", "answer": f"a{number}", "reward": reward}
        row["checked"] = checked
    for part in range(2):
        chosen = rows[3 * part : 3 * part + 3]
        writer.write_part(part, {name: [row[name] for row in chosen] for name in ROLLOUTS.names})
    return writer.finish(2)


def test_what_changed_is_counted_and_listed(store: Store, tmp_path: Path) -> None:
    verifier = Noting(r0=1.0, r1=0.25, r2=None, r3=0.0, r4=None, r5=0.25)
    found = verify_again(store.path, verifier, tmp_path / "again")
    assert verifier._asked == [(f"p{n}", f"r{n}", f"a{n}") for n in range(6)]
    assert [(c.group, c.sample, c.before, c.after) for c in found.changes] == [
        (0, 1, 0.0, 0.25),
        (1, 1, None, 0.0),
        (2, 0, 1.0, None),
        (2, 1, 0.5, 0.25),
    ]
    assert found.summary() == "4 of 6 verdicts changed: 1 higher, 1 lower, 1 no longer checked, 1 now checked"
    assert str(found.changes[1]) == "1.1  unchecked -> 0  answer a3  response …r3"
    before, after = store.table(), found.store.table()
    assert after["reward"].to_pylist() == [1.0, 0.25, 0.0, 0.0, 0.0, 0.25]
    assert after["checked"].to_pylist() == [True, True, False, True, False, True]
    same = [name for name in ROLLOUTS.names if name not in ("reward", "checked", "rewards")]
    assert after.select(same).equals(before.select(same))
    assert found.store.metadata == {
        **METADATA,
        "verifier": ["Noting", {"rewards": verifier.rewards}],
        "verified_again": store.fingerprint,
    }
    assert Store.open(store.path).fingerprint == store.fingerprint


def test_no_change(store: Store, tmp_path: Path) -> None:
    verifier = Noting(r0=1.0, r2=None, r3=None, r4=1.0, r5=0.5)
    found = verify_again(store, verifier, tmp_path / "again")
    assert (found.changes, found.summary()) == ([], "0 of 6 verdicts changed")


def test_it_goes_on_with_the_parts_that_are_missing(store: Store, tmp_path: Path) -> None:
    whole = verify_again(store, Noting(r1=1.0, r5=1.0), tmp_path / "whole")
    again = Noting(r1=1.0, r5=1.0)
    assert verify_again(store, again, tmp_path / "whole") == whole
    assert again._asked == []
    (whole.store.path / "manifest.json").unlink()
    (whole.store.path / "part-00001.parquet").unlink()
    assert verify_again(store, again, tmp_path / "whole") == whole
    assert [asked[1] for asked in again._asked] == ["r3", "r4", "r5"]
    with pytest.raises(UserError, match="missing or was written under other settings"):
        verify_again(store, Noting(), tmp_path / "whole")


def test_rewards_are_made_of_parts(store: Store, tmp_path: Path) -> None:
    parts = {"a": WeightedReward(Noting(r0=2.0)), "b": WeightedReward(Noting(r1=None), 0.0)}
    found = verify_again(store, WeightedRewards(parts), tmp_path / "again")
    assert read_parts(found.store.table()) == {"a": [2.0, *[0.0] * 5], "b": [0.0, None, *[0.0] * 4]}


def test_with_a_tokenizer_it_sees_what_it_sees_while_sampling(store: Store, tmp_path: Path) -> None:
    tokenizer, verifier = TASK.tokenizer(), Noting()
    verify_again(store, verifier, tmp_path / "again", tokenizer)
    ids = store.table()["response_ids"].to_pylist()
    assert [asked[1] for asked in verifier._asked] == [tokenizer.decode(row[:-1]) for row in ids]


@pytest.mark.parametrize("kind", ["itself", "scores", "nothing", "damaged"])
def test_mistakes(store: Store, tmp_path: Path, kind: str) -> None:
    path, output = store.path, tmp_path / "again"
    if kind == "itself":
        output, told = path, "is the store itself"
    elif kind == "scores":
        writer = StoreWriter(tmp_path / "scores", SCORES, {})
        writer.write_part(0, {name: [] for name in SCORES.names})
        path, told = writer.finish(1).path, "is a store of scores: only rollouts can be verified"
    elif kind == "nothing":
        path, told = tmp_path / "nowhere", "holds no finished store"
    else:
        (path / "part-00000.parquet").write_bytes(b"x")
        told = "was altered or truncated"
    with pytest.raises(UserError, match=told):
        verify_again(path, ExactMatch(), output)
    assert not output.exists() or output == path
