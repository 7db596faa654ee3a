"""Several rewards in one: their sum, what could not be checked, and their parts in the store."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from erpd_lightning.data.reward_parts import read_parts
from erpd_lightning.data.verifiers import Verdicts, Verifier, WeightedReward, WeightedRewards, take_verdicts
from erpd_lightning.errors import UserError
from erpd_lightning.modules.evaluation import EvaluationModule
from support.rollouts import sample
from support.trainers import make_trainer
from support.verifiers import EvenEnd, Short


class Given(Verifier):
    """Gives what a test says, and notes that it was started."""

    def __init__(self, *rewards: Any) -> None:
        self.rewards = list(rewards)
        self.started = 0

    def start(self) -> None:
        self.started += 1

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        return self.rewards


def weighted(**rewards: tuple[Verifier, float]) -> WeightedRewards:
    return WeightedRewards({name: WeightedReward(*reward) for name, reward in rewards.items()})


def check(verifier: Verifier, count: int) -> Verdicts:
    return take_verdicts(verifier, ["p"] * count, ["r"] * count, ["a"] * count)


def test_the_weighted_sum_of_what_could_be_checked() -> None:
    parts = weighted(
        correct=(Given(1, 0.0, None, 1.0), 1.0),
        format=(Given(1.0, None, 1.0, 0.5), -0.5),
        length=(Given(None, 7.0, 7.0, 7.0), 0.0),
    )
    rewards, found = check(parts, 4)
    assert rewards == [0.5, None, None, 0.75]
    assert found == {
        "correct": [1.0, 0.0, None, 1.0],
        "format": [1.0, None, 1.0, 0.5],
        "length": [None, 7.0, 7.0, 7.0],
    }
    assert parts(["r"] * 4, ["a"] * 4) == rewards
    parts.start()
    assert [part.verifier.started for part in parts.rewards.values()] == [1, 1, 1]  # type: ignore[attr-defined]


def test_rewards_within_rewards() -> None:
    inner = weighted(a=(Given(1.0), 2.0), b=(Given(3.0), 1.0))
    rewards, found = check(weighted(x=(inner, 10.0), y=(Given(1.0), 1.0)), 1)
    assert rewards == [51.0]
    assert found == {"x": [5.0], "x/a": [1.0], "x/b": [3.0], "y": [1.0]}


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: WeightedRewards({}), "^rewards is empty"),
        (lambda: weighted(a=(Given(), 0.0)), "^rewards has weights of 0 alone"),
        (lambda: weighted(a=(Given(), float("nan"))), r"^rewards\.a\.weight is nan"),
        (lambda: WeightedRewards({"a b": WeightedReward(Given())}), "^rewards has 'a b'"),
        (lambda: check(weighted(a=(Given(1.0), 1.0)), 2), "^Given gave 1 rewards for 2 responses"),
        (lambda: check(weighted(a=(Given(float("inf")), 1.0)), 1), "^Given gave inf as the reward of response 1"),
        (lambda: check(weighted(a=(Given(1e38), 10.0)), 1), r"^WeightedRewards gave 1e\+39"),
    ],
)
def test_mistakes(make: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        make()


class Wrong(Given):
    """Gives other parts than it says."""

    def verify(self, prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str]) -> Any:
        return self.rewards[0]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([1.0], r"^Wrong\.verify gave \[1\.0\] of type list: it must give Verdicts"),
        (Verdicts([1.0], {"a": [1.0]}), r"^Wrong\.verify gave the parts \['a'\]: part_names says \[\]"),
    ],
)
def test_verdicts_of_another_form(given: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        check(Wrong(given), 1)


def test_parts_are_stored_and_logged(make_data: Any, policy: Path, tmp_path: Path) -> None:
    verifier = weighted(even=(EvenEnd(), 1.0), short=(Short(), 0.25))
    held_out = str(tmp_path / "prompts.jsonl")
    data = make_data(verifier=verifier, validation_prompts=held_out, validation_samples=4)
    table = sample(data, policy).table()
    parts = read_parts(table)
    responses = table["response"].to_pylist()
    assert parts["short"] == Short()(responses, responses)
    unchecked = [value is None for value in parts["even"]]
    assert 0 < sum(unchecked) < len(responses)
    assert [not checked for checked in table["checked"].to_pylist()] == unchecked
    for row, (even, short) in enumerate(zip(parts["even"], parts["short"], strict=True)):
        assert short is not None
        assert table["reward"][row].as_py() == (0.0 if even is None else even + 0.25 * short)
    (found,) = make_trainer().test(EvaluationModule(policy), datamodule=data, verbose=False)
    assert 0 < found["test/rewards/short"] < 1
    known = found["test/mean_reward"]
    assert 0 < found["test/rewards/even"] <= known <= found["test/rewards/even"] + 0.25
