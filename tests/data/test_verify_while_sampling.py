"""Responses are verified while the next ones are drawn, and nothing of that shows in the store."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samplers import Response, TransformersSampler
from erpd_lightning.data.store import Store
from erpd_lightning.data.verifiers import Verifier
from erpd_lightning.errors import UserError
from erpd_lightning.modules.policy_module import PolicyModule
from support.rollouts import GROUP_SIZE, PROMPTS
from support.trainers import make_trainer
from support.verifiers import EvenEnd

SECONDS = 0.2

EVENTS: list[tuple[str, float, float]] = []


def note(what: str, start: float) -> None:
    EVENTS.append((what, start, time.monotonic()))


class SlowSampler(TransformersSampler):
    """Takes a while, and says when."""

    def sample(self, *args: Any, **kwargs: Any) -> list[Response]:
        start = time.monotonic()
        time.sleep(SECONDS)
        responses = super().sample(*args, **kwargs)
        note("draw", start)
        return responses


class SlowVerifier(EvenEnd):
    """Takes a while, says when, and refuses the batch that it is told to."""

    def __init__(self, refuses: int = -1) -> None:
        self._refuses = refuses
        self._calls = 0

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        start = time.monotonic()
        time.sleep(SECONDS)
        note("verify", start)
        self._calls += 1
        return (
            [float("nan")] * len(responses)
            if self._calls == self._refuses + 1
            else super().__call__(responses, answers)
        )


def predict(data: RolloutDataModule, policy: Path) -> None:
    EVENTS.clear()
    make_trainer().predict(PolicyModule(policy), datamodule=data.sampling(), return_predictions=False)


def slow(make_data: Callable[..., RolloutDataModule], store: str, verifier: Verifier) -> RolloutDataModule:
    # Two prompts a batch.
    return make_data(store, sampler=SlowSampler(8, batch_size=2 * GROUP_SIZE), verifier=verifier)


def test_checking_overlaps_sampling(make_data: Callable[..., RolloutDataModule], policy: Path) -> None:
    data = slow(make_data, "slow", SlowVerifier())
    predict(data, policy)
    draws = [event for event in EVENTS if event[0] == "draw"]
    verified = [event for event in EVENTS if event[0] == "verify"]
    assert len(draws) == len(verified) == len(PROMPTS) // 2 == 3
    overlaps = sum(begin < end and start < stop for _, begin, stop in draws for _, start, end in verified)
    assert overlaps == 2  # Each batch but the last is verified during the next.
    assert draws[2][1] >= verified[0][2]  # No more than one waits.
    table = Store.open(data.store).table()
    assert [EvenEnd.check(text) for text in table["response"].to_pylist()] == [
        reward if checked else None
        for reward, checked in zip(table["reward"].to_pylist(), table["checked"].to_pylist(), strict=True)
    ]


@pytest.mark.parametrize("batch", [0, 2])
def test_a_mistake_is_raised_and_what_was_verified_is_kept(
    make_data: Callable[..., RolloutDataModule], policy: Path, batch: int
) -> None:
    data = slow(make_data, "slow", SlowVerifier(refuses=batch))
    with pytest.raises(UserError, match=r"^SlowVerifier gave nan"):
        predict(data, policy)
    assert not Store.exists(data.store)
    parts = sorted(path.name for path in data.store.glob("*.parquet"))
    assert parts == [f"part-{number:05d}.parquet" for number in range(batch)]
    again = slow(make_data, "slow", SlowVerifier())
    predict(again, policy)
    assert sum(event[0] == "draw" for event in EVENTS) == 3 - batch
    alone = slow(make_data, "alone", SlowVerifier())
    predict(alone, policy)
    assert Store.open(again.store).fingerprint == Store.open(alone.store).fingerprint
