"""Measures that the report derives from records: ratios with standard errors, KL by position and by kind of token."""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .read import Measured

MAX_POSITION_BINS = 40
"""Greatest number of bins of positions."""

KINDS = ("digits", "letters", "punctuation, symbols", "whitespace", "special", "mixed", "other")

Row = Mapping[str, Any]
"""A response of the `SAMPLES` schema."""


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error, which is NaN where it is unknown."""

    value: float
    stderr: float


@dataclass(frozen=True)
class Bin:
    """Mean KL at a range of positions.

    Attributes:
        first: First position of the range, from 1.
        last: Last position of the range.
        responses: Number of responses that reach the first position.
        kl: Nats per token.
    """

    first: int
    last: int
    responses: int
    kl: Estimate


@dataclass(frozen=True)
class Kind:
    """Mean KL at the tokens of a kind.

    Attributes:
        name: One of `KINDS`.
        tokens: Number of tokens.
        share: Share of the KL of all tokens.
        kl: Nats per token.
    """

    name: str
    tokens: int
    share: float
    kl: Estimate


def kl_by_position(rows: Sequence[Row]) -> list[Bin]:
    """Mean KL at each position, or at ranges of equally many positions where responses are long."""
    lengths = [len(row["kls"]) for row in rows]
    longest = max(lengths, default=0)
    width = -(-longest // MAX_POSITION_BINS)
    values, prompts = _flat(rows)
    positions = np.concatenate([np.arange(length) for length in lengths]) if rows else np.zeros(0, dtype=int)
    return [
        Bin(
            first=start + 1,
            last=min(start + width, longest),
            responses=sum(length > start for length in lengths),
            kl=_mean(values, prompts, (positions >= start) & (positions < start + width)),
        )
        for start in range(0, longest, width or 1)
    ]


def kl_by_kind(rows: Sequence[Row]) -> list[Kind]:
    """Mean KL at the tokens of each kind that occurs."""
    values, prompts = _flat(rows)
    kinds = np.array(
        [
            kind_of(text, special)
            for row in rows
            for text, special in zip(row["token_texts"], row["special"], strict=True)
        ]
    )
    found = []
    for name in KINDS:
        chosen = kinds == name
        if chosen.any():
            share = float(values[chosen].sum() / values.sum()) if values.sum() > 0 else math.nan
            found.append(Kind(name, int(chosen.sum()), share, _mean(values, prompts, chosen)))
    return found


def kind_of(text: str, special: bool) -> str:
    """Kind of a token, by the Unicode categories of its text without the space around it.

    `mixed` is of several kinds; `other` has characters of none, such as control characters, or is a fragment of a
    character.
    """
    if special:
        return "special"
    inner = text.strip()
    if not inner:
        return "whitespace" if text else "other"
    kinds = {"N": "digits", "L": "letters", "M": "letters", "P": KINDS[2], "S": KINDS[2], "Z": "whitespace"}
    found = {kinds.get(unicodedata.category(c)[0], "other") for c in inner}
    if "other" in found or "\N{REPLACEMENT CHARACTER}" in inner:
        return "other"
    return found.pop() if len(found) == 1 else "mixed"


def kl_saving(student: Measured, teacher: Measured) -> Estimate | None:
    """Share of the teacher's KL that the student did without; None if the teacher has none.

    Its standard error is the delta method's for two independent means.
    """
    s, t = student["kl_per_token"], teacher["kl_per_token"]
    if t <= 0:
        return None
    errors = student["kl_per_token_stderr"], s / t * teacher["kl_per_token_stderr"]
    return Estimate(1 - s / t, math.hypot(*errors) / t)


def accuracy_gain(before: Measured, after: Measured) -> Estimate:
    """Gain of pass@1 in points (hundredths).

    The standard error takes both means for independent; that they share their prompts makes it too large if anything.
    """
    points = 100 * (after["pass@1"] - before["pass@1"])
    return Estimate(points, 100 * math.hypot(before["pass@1_stderr"], after["pass@1_stderr"]))


def rollouts_per_point(rollouts: float, gained: Estimate) -> Estimate | None:
    """Number of rollouts for each point gained; None where the gain is not twice its standard error."""
    if not gained.value > 2 * gained.stderr:
        return None
    each = rollouts / gained.value
    return Estimate(each, each * gained.stderr / gained.value)


def _flat(rows: Sequence[Row]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """KL and prompt of every token."""
    values = np.array([kl for row in rows for kl in row["kls"]], dtype=np.float64)
    prompts = np.repeat([row["group"] for row in rows], [len(row["kls"]) for row in rows]) if rows else np.zeros(0)
    return values, prompts.astype(np.int64)


def _mean(values: NDArray[np.float64], prompts: NDArray[np.int64], chosen: NDArray[np.bool_]) -> Estimate:
    """Mean over the chosen tokens; its standard error counts prompts, by the delta method for a ratio of sums."""
    prompts = np.unique(prompts[chosen], return_inverse=True)[1]
    count = np.bincount(prompts)
    if not len(count):
        return Estimate(math.nan, math.nan)
    total = np.bincount(prompts, values[chosen])
    mean = total.sum() / count.sum()
    clusters = len(count)
    if clusters < 2:
        return Estimate(float(mean), math.nan)
    squares = ((total - mean * count) ** 2).sum()
    return Estimate(float(mean), float(np.sqrt(clusters / (clusters - 1) * squares) / count.sum()))
