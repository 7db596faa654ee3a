"""What a verifier is, and what it may give."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from ...errors import UserError
from ..settings import public_settings

MAX_REWARD = float(np.finfo(np.float32).max)
"""The largest number that a store can hold."""


class Verdicts(NamedTuple):
    """What a verifier says of some responses.

    Attributes:
        rewards: The reward of each response; None where it could not be checked.
        parts: What the rewards are made of, by name, in the same way; empty where they are made of nothing else.
    """

    rewards: list[float | None]
    parts: dict[str, list[float | None]]


class Verifier(ABC):
    """Checks responses against reference answers.

    A verifier defines `__call__`. One that also needs the prompts, or whose rewards are made of several, defines
    `verify`.
    """

    @abstractmethod
    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        """The reward of each response: 1.0 correct, 0.0 incorrect, None where it could not be checked.

        Other finite numbers are graded rewards, which count as correct from `RolloutDataModule.correct_threshold` on;
        True and False are 1.0 and 0.0.
        """

    def verify(self, prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str]) -> Verdicts:
        """The rewards of responses, and what they are made of; by default what `__call__` gives.

        Args:
            prompts: The prompt of each response; chat messages as JSON.
            responses: The responses.
            answers: The reference answer of each.
        """
        return Verdicts(self(responses, answers), {})

    def final_answers(self, responses: Sequence[str]) -> Sequence[str | None] | None:
        """The final answer that each response gives, for majority votes: equal answers are equal strings.

        None for a response that gives no answer; None in place of all of them, as here, for a verifier that does not
        look for answers. Two forms of one answer may be two strings, but two answers are never one string.
        """
        return None

    @property
    def part_names(self) -> list[str]:
        """Names of the parts that `verify` gives; by default none."""
        return []

    def start(self) -> None:  # noqa: B027 - most need nothing
        """Find out, before anything is sampled, whether responses can be checked; by default nothing is asked.

        Raises:
            UserError: If what checks them is not there.
        """

    def settings(self) -> dict[str, Any]:
        """All that verdicts depend on, as JSON values: by default the public attributes.

        Rollouts are stored with them, and belong to a run only while they are the same.

        Raises:
            UserError: If an attribute cannot be written down.
        """
        return public_settings(self)


class Unverified(Verifier):
    """Checks nothing: for responses whose reward nobody asks for."""

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        """See `Verifier`."""
        return [None for _ in responses]


def take_rewards(verifier: Verifier, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
    """What a verifier gives for responses whose prompts nobody knows; see `take_verdicts`."""
    return take_verdicts(verifier, [""] * len(responses), responses, answers).rewards


def take_verdicts(
    verifier: Verifier, prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str]
) -> Verdicts:
    """What a verifier gives for responses, once it is known to be rewards.

    Raises:
        UserError: If it is not one finite number or None for each response, also of each part that it names.
    """
    given: Any = verifier.verify(prompts, responses, answers)
    name = type(verifier).__name__
    if not isinstance(given, Verdicts):
        raise UserError(f"{name}.verify gave {_shown(given)}: it must give Verdicts")
    if list(given.parts) != list(verifier.part_names):
        raise UserError(f"{name}.verify gave the parts {list(given.parts)}: part_names says {verifier.part_names}")
    parts = {part: _rewards(f"{name}, part {part},", rewards, responses) for part, rewards in given.parts.items()}
    return Verdicts(_rewards(name, given.rewards, responses), parts)


def _rewards(name: str, given: Any, responses: Sequence[str]) -> list[float | None]:
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise UserError(f"{name} gave {_shown(given)}: it must give a list of a number or None for each response")
    if len(given) != len(responses):
        raise UserError(f"{name} gave {len(given)} rewards for {len(responses)} responses: it must give one for each")
    return [_reward(name, number, value) for number, value in enumerate(given, 1)]


def _reward(name: str, number: int, value: Any) -> float | None:
    if value is None:
        return None
    # numpy's bool is not registered as a number.
    is_number = isinstance(value, Real | np.bool_)
    try:
        reward = float(value) if is_number else math.nan
    except OverflowError:
        reward = math.inf
    if not abs(reward) <= MAX_REWARD:  # NaN is not either
        raise UserError(
            f"{name} gave {_shown(value)} as the reward of response {number} of its batch: it must be a finite number, "
            "or None where the response could not be checked"
        )
    return reward


def _shown(value: Any) -> str:
    """A value in a line: its type too, unless it is a plain one."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # Python refuses to print integers of more than 4,300 digits.
        return f"something of type {type(value).__name__} that cannot be printed"
    text = text if len(text) <= 80 else text[:77] + "..."
    return text if isinstance(value, int | float | str) else f"{text} of type {type(value).__name__}"
