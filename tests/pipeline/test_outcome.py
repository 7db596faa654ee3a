"""What the record of a stage says of its rollouts, and what the user is told of them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from erpd_lightning.data.audit import Audit, audit
from erpd_lightning.data.rescoring import LogpGap
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.errors import UserError
from erpd_lightning.pipeline.outcome import advice, rollouts_outcome, summary_line
from support.policies import make_rows, write_rollouts


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., RolloutDataModule]:
    return lambda **settings: RolloutDataModule(tmp_path / "0", "nowhere", **settings)


def stores(folder: Path, unchecked: Sequence[int] = ()) -> list[Path]:
    """Two stores of a group of four each, with two correct responses in each."""
    rows = [
        {**row, "reward": float(number % 4 < 2 and number not in unchecked), "checked": number not in unchecked}
        for number, row in enumerate(make_rows(groups=2))
    ]
    return [write_rollouts(folder / str(part), rows[4 * part : 4 * part + 4]).path for part in range(2)]


@pytest.mark.parametrize(
    ("unchecked", "mean_reward"), [((), 0.5), ((0, 1), 2 / 6), (range(8), None)], ids=["none", "some", "all"]
)
def test_what_could_not_be_checked_is_counted_and_told(
    tmp_path: Path, make_data: Callable[..., RolloutDataModule], unchecked: Sequence[int], mean_reward: float | None
) -> None:
    record, told = rollouts_outcome(make_data(), stores(tmp_path, unchecked))
    assert (record["rollouts"], record["unchecked"]) == (8, len(unchecked))
    assert record["mean_reward"] == (None if mean_reward is None else pytest.approx(mean_reward))
    assert f"{len(unchecked) / 8:.1%} unscorable" in told[0]
    assert ("of the responses could not be checked" in "".join(record["warnings"])) == bool(unchecked)
    assert told[len(told) - len(record["warnings"]) :] == [f"warning: {line}" for line in record["warnings"]]


def test_the_means_of_what_rewards_are_made_of(tmp_path: Path, make_data: Callable[..., RolloutDataModule]) -> None:
    rows = make_rows(groups=1)
    texts = ['{"a": 1.0, "b": null}', '{"a": 0.5, "b": null}', '{"a": null, "b": null}', '{"a": 0.0, "b": null}']
    write_rollouts(tmp_path / "store", [{**row, "rewards": text} for row, text in zip(rows, texts, strict=True)])
    write_rollouts(tmp_path / "plain", rows)
    assert rollouts_outcome(make_data(), [tmp_path / "store"])[0]["mean_rewards"] == {"a": 0.5, "b": None}
    assert rollouts_outcome(make_data(), [tmp_path / "plain"])[0]["mean_rewards"] == {}


def test_thresholds_warn_and_stop(tmp_path: Path, make_data: Callable[..., RolloutDataModule]) -> None:
    paths = stores(tmp_path, unchecked=[0, 1])
    assert rollouts_outcome(make_data(audit_warn={"unscorable": 0.25, "empty": 1.0}), paths)[0]["warnings"] == []
    with pytest.raises(
        UserError, match=r"25\.0% of the responses could not be .* \(threshold: 24\.0%\); they are kept"
    ):
        rollouts_outcome(make_data(), paths, stop={"unscorable": 0.24})
    rollouts_outcome(make_data(), paths, stop={"unscorable": 0.25})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"audit_warn": {"truncatd": 0.1}}, "audit_warn has 'truncatd': there are truncated, unscorable"),
        ({"audit_stop": {"gap": -0.1}}, r"audit_stop\.gap is -0\.1: it must be at least 0"),
    ],
)
def test_thresholds_that_are_none(
    make_data: Callable[..., RolloutDataModule], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_data(**settings)


@pytest.fixture
def some(tmp_path: Path) -> Audit:
    """An audit of two groups, one mixed."""
    return audit([write_rollouts(tmp_path / "store", make_rows(groups=2))])


def test_the_line_says_what_there_is(some: Audit) -> None:
    assert (
        summary_line(some, 3)
        == "8 responses: 37.5% correct, 0.0% truncated, 0.0% unscorable; 2 of 2 groups mixed; 3 optimiser steps an "
        "epoch"
    )
    gapped = replace(some, correct=None, sampler_gap=LogpGap(100, 0.0123, 0.5, 1.25))
    assert summary_line(gapped, 1).endswith(
        "1 optimiser step an epoch; sampler and trainer differ by 0.012 nats a token on average, by 0.5 at the 99.9th "
        "percentile and by 1.2 at most"
    )
    assert "responses: none could be checked" in summary_line(gapped)


def test_near_0_and_1_it_says_what_to_try(some: Audit) -> None:
    def advised(correct: float | None, baseline: str = "group", **changes: float) -> str | None:
        return advice(replace(some, correct=correct, **changes), baseline)  # type: ignore[arg-type]

    assert advised(0.05) is advised(0.95) is None
    messages = [advised(correct) for correct in (None, 0.0, 1.0)]
    assert len({str(message)[:20] for message in messages}) == 3
    assert "data.verifier" in str(messages[0])
    assert "baseline" not in f"{messages[1]} {messages[2]}"  # where nothing varies, nothing can be compared
    assert "data.baseline: batch" in str(advised(0.02))
    assert "data.baseline" not in str(advised(0.02, "batch"))
    assert "max_new_tokens" not in str(advised(0.02))
    assert "a larger data.sampler.max_new_tokens" in str(advised(0.02, truncated=0.5))
    assert "harder prompts" in str(advised(0.97))
