"""What a verifier is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence


class Verifier(ABC):
    """Checks responses against reference answers."""

    @abstractmethod
    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        """The reward of each response: 1.0 correct, 0.0 incorrect, None where it could not be checked.

        Graded rewards may be any finite numbers; from `RolloutDataModule.correct_threshold` on they count as correct.
        """


class Unverified(Verifier):
    """Checks nothing: for responses whose reward nobody asks for."""

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        """See `Verifier`."""
        return [None for _ in responses]
