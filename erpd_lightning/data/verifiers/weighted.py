"""Several rewards in one."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...errors import InvalidArgument
from .base import Verdicts, Verifier, take_verdicts

PART_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass
class WeightedReward:
    """One of several rewards.

    Attributes:
        verifier: What gives it.
        weight: What it is multiplied by; a reward of weight 0 is only stored and logged.
    """

    verifier: Verifier
    weight: float = 1.0


class WeightedRewards(Verifier):
    """The weighted sum of several rewards.

    Each of them is stored with the rollouts (column `rewards`) and logged (`val/rewards/NAME`). A response is checked
    where every reward whose weight is not 0 could be checked. From which sum on a response counts as correct is
    `RolloutDataModule.correct_threshold`.

    Args:
        rewards: The rewards by name.
    """

    def __init__(self, rewards: Mapping[str, WeightedReward]) -> None:
        if not rewards:
            raise InvalidArgument("rewards", "is empty: name at least one reward")
        for name, reward in rewards.items():
            if not PART_NAME.fullmatch(name):
                raise InvalidArgument("rewards", f"has {name!r}: a name has letters, digits, - and _ alone")
            if not math.isfinite(reward.weight):
                raise InvalidArgument(f"rewards.{name}.weight", f"is {reward.weight}: it must be a finite number")
        if all(reward.weight == 0 for reward in rewards.values()):
            raise InvalidArgument("rewards", "has weights of 0 alone: at least one must be another")
        self.rewards = dict(rewards)

    @property
    def part_names(self) -> list[str]:
        """See `Verifier`; parts of a part are `NAME/PART`."""
        return [
            path
            for name, reward in self.rewards.items()
            for path in (name, *(f"{name}/{part}" for part in reward.verifier.part_names))
        ]

    def start(self) -> None:
        """See `Verifier`."""
        for reward in self.rewards.values():
            reward.verifier.start()

    def verify(self, prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str]) -> Verdicts:
        """See `Verifier`."""
        parts: dict[str, list[float | None]] = {}
        sums: list[float | None] = [0.0] * len(responses)
        for name, reward in self.rewards.items():
            verdicts = take_verdicts(reward.verifier, prompts, responses, answers)
            parts[name] = verdicts.rewards
            parts.update({f"{name}/{part}": rewards for part, rewards in verdicts.parts.items()})
            if reward.weight != 0:
                sums = [
                    None if so_far is None or value is None else so_far + reward.weight * value
                    for so_far, value in zip(sums, verdicts.rewards, strict=True)
                ]
        return Verdicts(sums, parts)

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        """See `Verifier`."""
        return self.verify([""] * len(responses), responses, answers).rewards
