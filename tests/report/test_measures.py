"""Measures of the report: KL by position and by kind of token, the KL that was saved, the price of a point."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from erpd_lightning.report import measures
from erpd_lightning.report.measures import (
    Estimate,
    accuracy_gain,
    kind_of,
    kl_by_kind,
    kl_by_position,
    kl_saving,
    rollouts_per_point,
)
from support.made_run import RESPONSES, measured, sample


def stderr_over_prompts(sums: Sequence[float], counts: Sequence[int]) -> float:
    """Of a ratio of sums, by the standard deviation of its linearised residuals."""
    x, n = np.array(sums), np.array(counts)
    return float(np.std(x - n * x.sum() / n.sum(), ddof=1) * len(x) ** 0.5 / n.sum())


def test_kl_by_position() -> None:
    bins = kl_by_position(RESPONSES)
    assert [(b.first, b.last, b.responses) for b in bins] == [(1, 1, 4), (2, 2, 3), (3, 3, 2), (4, 4, 2)]
    assert [b.kl.value for b in bins] == pytest.approx([1.2 / 4, 3.2 / 3, 0.3, 0.0])
    expected = [
        stderr_over_prompts([0.4, 0.8], [2, 2]),
        stderr_over_prompts([0.2, 3.0], [2, 1]),
        stderr_over_prompts([0.5, 0.1], [1, 1]),
        0.0,
    ]
    assert [b.kl.stderr for b in bins] == pytest.approx(expected)


def test_long_responses_are_binned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "MAX_POSITION_BINS", 2)
    rows = [sample(0, 0, "abcde", [1.0, 2.0, 3.0, 4.0, 8.0]), sample(1, 0, "ab", [3.0, 2.0])]
    bins = kl_by_position(rows)
    assert [(b.first, b.last, b.responses) for b in bins] == [(1, 3, 2), (4, 5, 1)]
    assert [b.kl.value for b in bins] == pytest.approx([11 / 5, 6.0])
    assert math.isnan(bins[1].kl.stderr)  # A single prompt tells none.
    assert kl_by_position([]) == []


def test_kl_by_kind() -> None:
    kinds = {kind.name: kind for kind in kl_by_kind(RESPONSES)}
    assert list(kinds) == ["digits", "letters", "punctuation, symbols", "whitespace", "special"]
    assert {name: kind.tokens for name, kind in kinds.items()} == {
        "digits": 5,
        "letters": 1,
        "punctuation, symbols": 1,
        "whitespace": 1,
        "special": 3,
    }
    assert kinds["digits"].kl.value == pytest.approx(1.7 / 5)
    assert kinds["digits"].kl.stderr == pytest.approx(stderr_over_prompts([0.9, 0.8], [3, 2]))
    assert kinds["whitespace"].share == pytest.approx(3.0 / 5.0)
    assert sum(kind.share for kind in kinds.values()) == pytest.approx(1.0)
    assert all(math.isnan(kind.share) for kind in kl_by_kind([sample(0, 0, "1", [0.0])]))
    assert kl_by_kind([]) == []


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" 42", "digits"),
        ("²", "digits"),
        (" the", "letters"),
        ("né", "letters"),
        ("का", "letters"),
        (" +=", "punctuation, symbols"),
        ("😀", "punctuation, symbols"),
        ("\n\t ", "whitespace"),
        ("a1", "mixed"),
        (").", "punctuation, symbols"),
        ("don't", "mixed"),
        ("\x00", "other"),
        ("\u202e", "other"),
        ("a\N{REPLACEMENT CHARACTER}", "other"),
        ("", "other"),
    ],
)
def test_the_kind_of_a_token(text: str, kind: str) -> None:
    assert kind_of(text, special=False) == kind
    assert kind_of(text, special=True) == "special"


def test_the_share_that_the_student_did_without() -> None:
    found = kl_saving(measured(0.6, 0.05, kl_per_token_stderr=0.005), measured(0.4, 0.4, kl_per_token_stderr=0.02))
    assert found is not None
    ratio = 0.05 / 0.4
    assert found.value == pytest.approx(1 - ratio)
    assert found.stderr == pytest.approx(ratio * ((0.005 / 0.05) ** 2 + (0.02 / 0.4) ** 2) ** 0.5)
    assert kl_saving(measured(0.6, 0.05), measured(0.4, 0.0)) is None


def test_the_price_of_a_point() -> None:
    gained = accuracy_gain(
        measured(0.25, 0.0, **{"pass@1_stderr": 0.03}), measured(0.65, 0.05, **{"pass@1_stderr": 0.04})
    )
    assert (gained.value, gained.stderr) == (pytest.approx(40.0), pytest.approx(5.0))
    price = rollouts_per_point(4096, gained)
    assert price is not None
    assert (price.value, price.stderr) == (pytest.approx(102.4), pytest.approx(12.8))
    assert rollouts_per_point(4096, Estimate(9.9, 5.0)) is None
    assert rollouts_per_point(4096, Estimate(-40.0, 5.0)) is None
    assert rollouts_per_point(4096, Estimate(math.nan, math.nan)) is None
