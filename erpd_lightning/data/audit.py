"""Audit of rollouts: what in them would make training learn little or the wrong thing, counted from their stores."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InvalidArgument, UserError
from .rescoring import LogpGap, logp_gap, rescored_store
from .store import Store

COLUMNS = ("group", "response_ids", "reward", "finish_reason", "checked", "response")
ROWS_AT_A_TIME = 256

LENGTH_PERCENTILES = (1, 10, 25, 50, 75, 90, 99)

LENGTH_PARTS = 5
"""Parts of equally many responses, from the shortest to the longest, whose rewards are compared."""

PROMPT_PARTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Bounds of the shares of correct responses by which prompts are counted, besides none and all."""

MEASURES = {
    "truncated": "of the responses are truncated",
    "unscorable": "of the responses could not be checked",
    "duplicate": "of the responses repeat another one to the same prompt",
    "empty": "of the responses are empty",
    "uniform": "of the groups have no two different rewards, hence no advantage",
    "gap": "nats a token lie between the log-probs of sampler and trainer, on average",
}
"""What thresholds can be set on: shares between 0 and 1, and the gap in nats."""

WARNINGS = {"truncated": 0.25, "unscorable": 0.05, "duplicate": 0.9, "empty": 0.05, "uniform": 0.9, "gap": 0.05}
"""Above which values one is warned by default. Duplicates are common where responses are a few tokens long."""


@dataclass(frozen=True)
class LengthPart:
    """Responses of similar length.

    Attributes:
        shortest: Tokens of the shortest.
        longest: Tokens of the longest.
        responses: How many there are.
        mean_reward: Of those that could be checked; None without any.
    """

    shortest: int
    longest: int
    responses: int
    mean_reward: float | None


@dataclass(frozen=True)
class PromptPart:
    """Prompts with a similar share of correct responses among those that could be checked.

    Attributes:
        above: The share is above this, or equal where `above` and `up_to` are.
        up_to: And at most this; below 1 unless `above` is 1.
        prompts: How many there are.
    """

    above: float
    up_to: float
    prompts: int


@dataclass(frozen=True)
class Audit:
    """Counts and shares of some rollouts.

    Attributes:
        responses: Number of responses.
        groups: Number of prompts.
        mixed_groups: Groups with different rewards among those that could be checked.
        correct: Share of correct responses among those that could be checked; None without any.
        mean_reward: Of the same.
        truncated: Share of the responses that were cut off.
        unscorable: Share that could not be checked.
        duplicate: Share that repeats another response to the same prompt, token by token.
        empty: Share whose text is nothing but white space.
        mean_length: In tokens.
        length_percentiles: In tokens, by the percentage.
        longest: In tokens.
        by_length: Rewards by length, the shortest first.
        by_prompt: Prompts by their share of correct responses.
        sampler_gap: Between the log-probs of sampler and trainer; None where they are the same.
    """

    responses: int
    groups: int
    mixed_groups: int
    correct: float | None
    mean_reward: float | None
    truncated: float
    unscorable: float
    duplicate: float
    empty: float
    mean_length: float
    length_percentiles: dict[str, float]
    longest: int
    by_length: list[LengthPart]
    by_prompt: list[PromptPart]
    sampler_gap: LogpGap | None

    def measure(self, name: str) -> float:
        """The value of one of `MEASURES`; a gap that nobody measured is 0: sampler and trainer are one."""
        if name == "uniform":
            return 1 - self.mixed_groups / max(self.groups, 1)
        if name == "gap":
            return 0.0 if self.sampler_gap is None else self.sampler_gap.mean
        value: float = getattr(self, name)
        return value

    def exceeded(self, thresholds: Mapping[str, float]) -> list[str]:
        """A line on each measure that is above its threshold."""
        return [
            f"{_shown(name, self.measure(name))} {MEASURES[name]} (threshold: {_shown(name, most)})"
            for name, most in thresholds.items()
            if self.measure(name) > most
        ]


def check_thresholds(argument: str, thresholds: Mapping[str, float]) -> None:
    """Refuse thresholds on what is not measured.

    Args:
        argument: What to call them.
        thresholds: By the names of `MEASURES`.

    Raises:
        InvalidArgument: Names the one that is wrong.
    """
    for name, most in thresholds.items():
        if name not in MEASURES:
            raise InvalidArgument(argument, f"has {name!r}: there are {', '.join(MEASURES)}")
        if not 0 <= most < float("inf"):
            raise InvalidArgument(f"{argument}.{name}", f"is {most}: it must be at least 0")


def audit(stores: Sequence[Store], correct_threshold: float = 1.0) -> Audit:
    """Audit of the rollouts in some stores, which are read as streams.

    Args:
        stores: Stores of the `ROLLOUTS` schema; a group lies in one of them.
        correct_threshold: Reward from which a response counts as correct.

    Raises:
        UserError: If there are no responses in them.
    """
    parts = [part for number, store in enumerate(stores) for part in _read(number, store)]
    if not parts:
        raise UserError(f"{stores[0].path} holds no responses")
    names = parts[0].keys()
    columns = {name: np.concatenate([part[name] for part in parts]) for name in names}
    lengths, rewards, checked = columns["lengths"], columns["rewards"], columns["checked"]
    count = len(lengths)
    _, group = np.unique(columns["groups"], axis=0, return_inverse=True)
    group = group.reshape(-1)
    correct = rewards >= correct_threshold
    pairs = [(store, rescored) for store in stores if (rescored := rescored_store(store)) is not None]
    return Audit(
        responses=count,
        groups=int(group.max()) + 1,
        mixed_groups=_mixed(group[checked], rewards[checked]),
        correct=_mean(correct[checked]),
        mean_reward=_mean(rewards[checked]),
        truncated=float(columns["truncated"].mean()),
        unscorable=float((~checked).mean()),
        duplicate=1 - len(np.unique(columns["digests"])) / count,
        empty=float(columns["empty"].mean()),
        mean_length=float(lengths.mean()),
        length_percentiles={str(p): float(np.percentile(lengths, p)) for p in LENGTH_PERCENTILES},
        longest=int(lengths.max()),
        by_length=_by_length(lengths, rewards, checked),
        by_prompt=_by_prompt(group[checked], correct[checked]),
        sampler_gap=logp_gap(pairs) if pairs else None,
    )


def _read(number: int, store: Store) -> Iterator[dict[str, np.ndarray]]:
    """A few numbers for each response of a store."""
    for batch in store.batches(COLUMNS, ROWS_AT_A_TIME):
        groups = batch["group"].to_numpy()
        yield {
            "groups": np.stack([np.full(len(groups), number), groups], axis=1),
            "lengths": pc.list_value_length(batch["response_ids"]).to_numpy(),
            "rewards": batch["reward"].to_numpy(),
            "checked": batch["checked"].to_numpy(),
            "truncated": pc.equal(batch["finish_reason"], "length").to_numpy(),
            "empty": pc.equal(pc.utf8_trim_whitespace(batch["response"]), "").to_numpy(),
            "digests": _digests(number, groups, batch["response_ids"]),
        }


def _digests(number: int, groups: np.ndarray, responses: pa.ChunkedArray) -> np.ndarray:
    """64 bits that tell a response to a prompt from others."""
    ids = [chunk.flatten().to_numpy() for chunk in responses.chunks]
    ends = np.cumsum(pc.list_value_length(responses).to_numpy())
    rows = np.split(np.concatenate(ids), ends[:-1])
    digests = [
        hashlib.blake2b(b"%d %d " % (number, group) + row.tobytes(), digest_size=8).digest()
        for group, row in zip(groups.tolist(), rows, strict=True)
    ]
    return np.frombuffer(b"".join(digests), np.uint64)


def _mixed(group: np.ndarray, rewards: np.ndarray) -> int:
    if len(group) == 0:
        return 0
    starts = np.flatnonzero(np.r_[True, np.diff(np.sort(group)) > 0])
    ordered = rewards[np.argsort(group, kind="stable")]
    lowest, highest = (reduce.reduceat(ordered, starts) for reduce in (np.minimum, np.maximum))
    return int((lowest < highest).sum())


def _by_length(lengths: np.ndarray, rewards: np.ndarray, checked: np.ndarray) -> list[LengthPart]:
    parts = np.array_split(np.argsort(lengths, kind="stable"), LENGTH_PARTS)
    return [
        LengthPart(int(lengths[rows[0]]), int(lengths[rows[-1]]), len(rows), _mean(rewards[rows][checked[rows]]))
        for rows in parts
        if len(rows)
    ]


def _by_prompt(group: np.ndarray, correct: np.ndarray) -> list[PromptPart]:
    sizes = np.bincount(group)
    share = np.bincount(group, weights=correct)[sizes > 0] / sizes[sizes > 0]
    between = [
        PromptPart(low, high, int(((share > low) & (share <= high) & (share < 1)).sum()))
        for low, high in pairwise(PROMPT_PARTS)
    ]
    none, all_ = (PromptPart(end, end, int((share == end).sum())) for end in (0.0, 1.0))
    return [none, *between, all_]


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean(dtype=np.float64)) if len(values) else None


def _shown(name: str, value: float) -> str:
    return f"{value:.3g}" if name == "gap" else f"{value:.1%}"
