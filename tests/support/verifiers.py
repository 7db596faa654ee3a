"""Verifiers for policies that know nothing: their responses are never correct, but short, or end with an even digit."""

from collections.abc import Sequence

from erpd_lightning.data.verifiers import Verifier


class Constant(Verifier):
    """The same reward for everyone."""

    def __init__(self, reward: float | None = 1.0) -> None:
        self.reward = reward

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        return [self.reward for _ in responses]


class Short(Verifier):
    """Rewards responses of few characters."""

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        return [float(len(response) < 6) for response in responses]


class Parity(Verifier):
    """Rewards responses whose characters add up to an odd number: about half of those of any policy."""

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        return [float(sum(map(ord, response)) % 2) for response in responses]


class EvenEnd(Verifier):
    """Rewards responses whose last character is an even digit; what ends with a 9 cannot be checked."""

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        return [self.check(response) for response in responses]

    @staticmethod
    def check(response: str) -> float | None:
        return None if response.endswith("9") else float(response[-1:] in set("02468"))
