"""Comparison of strings."""

import re
from collections.abc import Sequence
from functools import lru_cache

from ...errors import InvalidArgument
from .base import Verifier
from .worker_pool import check_timeout, shared_pool


class ExactMatch(Verifier):
    """Compares what a pattern finds in the response with the reference answer, as strings.

    Args:
        pattern: A regular expression with one group; the last match in the response is its answer. A response
            without a match is incorrect.
        timeout: Seconds that the pattern may take on one response, since some patterns take for ever on some
            responses; one that takes longer counts as not checked.
    """

    def __init__(self, pattern: str = r"=\s*(-?\d+)\s*$", timeout: float = 10.0) -> None:
        try:
            self.pattern = re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise InvalidArgument("pattern", f"is {pattern!r}, which is no regular expression: {error}") from None
        if self.pattern.groups != 1:
            raise InvalidArgument("pattern", f"is {pattern!r}: it must have exactly one group, the answer")
        check_timeout(timeout)
        self.timeout = timeout

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        """See `Verifier`.

        Raises:
            UserError: If the process that matches does not start.
        """
        pairs = [(self.pattern.pattern, *pair) for pair in zip(responses, answers, strict=True)]
        return shared_pool(f"{__name__}:match_answer").map(pairs, self.timeout)

    def final_answers(self, responses: Sequence[str]) -> list[str | None]:
        """See `Verifier`: what the pattern finds last. None also where that took too long.

        Raises:
            UserError: If the process that matches does not start.
        """
        pairs = [(self.pattern.pattern, response) for response in responses]
        return shared_pool(f"{__name__}:find_answer").map(pairs, self.timeout)


def match_answer(pattern: str, response: str, answer: str) -> float:
    """Whether the last match of a pattern with one group is the answer, apart from space around it."""
    return float(find_answer(pattern, response) == answer.strip())


def find_answer(pattern: str, response: str) -> str | None:
    """The last match of a pattern with one group, without space around it; None where there is none."""
    matches: list[str] = _compiled(pattern).findall(response)
    return matches[-1].strip() if matches else None


@lru_cache(maxsize=16)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
