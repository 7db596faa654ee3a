"""Comparison of strings."""

import re
from collections.abc import Sequence

from ...errors import InvalidArgument
from .base import Verifier


class ExactMatch(Verifier):
    """Compares what a pattern finds in the response with the reference answer, as strings.

    Args:
        pattern: A regular expression with one group; the last match in the response is its answer. A response
            without a match is incorrect.
    """

    def __init__(self, pattern: str = r"=\s*(-?\d+)\s*$") -> None:
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise InvalidArgument("pattern", f"is {pattern!r}, which is no regular expression: {error}") from None
        if self.pattern.groups != 1:
            raise InvalidArgument("pattern", f"is {pattern!r}: it must have exactly one group, the answer")

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        """See `Verifier`."""
        found = [self.pattern.findall(response) for response in responses]
        return [
            float(bool(matches) and matches[-1].strip() == answer.strip())
            for matches, answer in zip(found, answers, strict=True)
        ]
