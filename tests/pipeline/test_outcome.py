"""What the record of a stage says of its rollouts."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from erpd_lightning.pipeline.round_stages import _outcome
from support.policies import make_rows, write_rollouts


@pytest.mark.parametrize(
    ("unchecked", "mean_reward"), [((), 0.5), ((0, 1), 2 / 6), (range(8), None)], ids=["none", "some", "all"]
)
def test_what_could_not_be_checked_is_counted_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], unchecked: Sequence[int], mean_reward: float | None
) -> None:
    rows = [
        {**row, "reward": float(number % 4 < 2 and number not in unchecked), "checked": number not in unchecked}
        for number, row in enumerate(make_rows(groups=2))
    ]
    stores = [write_rollouts(tmp_path / str(part), rows[4 * part : 4 * part + 4]) for part in range(2)]
    found = _outcome(stores)
    assert (found["rollouts"], found["unchecked"]) == (8, len(unchecked))
    assert found["mean_reward"] == (None if mean_reward is None else pytest.approx(mean_reward))
    told = capsys.readouterr().out
    assert told.startswith(f"{len(unchecked)} of 8 responses could not be checked") if unchecked else told == ""


def test_the_means_of_what_rewards_are_made_of(tmp_path: Path) -> None:
    rows = make_rows(groups=1)
    texts = ['{"a": 1.0, "b": null}', '{"a": 0.5, "b": null}', '{"a": null, "b": null}', '{"a": 0.0, "b": null}']
    store = write_rollouts(
        tmp_path / "store", [{**row, "rewards": text} for row, text in zip(rows, texts, strict=True)]
    )
    assert _outcome([store])["mean_rewards"] == {"a": 0.5, "b": None}
    assert "mean_rewards" not in _outcome([write_rollouts(tmp_path / "plain", rows)])
