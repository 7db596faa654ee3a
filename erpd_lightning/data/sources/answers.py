r"""The answer that is in a column: all of it, what follows `####`, the last `\boxed{}`, or what a pattern finds."""

import re
from collections.abc import Sequence
from functools import lru_cache

from ..verifiers.final_answer import without_box
from ..verifiers.worker_pool import WorkerPool
from .source import PromptSource


class SlowPattern(Exception):
    """A pattern that took longer than its time limit; `index` says on which of the texts."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class AnswerFinder:
    """Takes answers out of texts by the rule or pattern of a source.

    Args:
        source: Says how.
    """

    def __init__(self, source: PromptSource) -> None:
        self.source = source
        self._pool = None if source.answer_pattern is None else WorkerPool(f"{__name__}:last_match")

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """The answer in each text; empty where there is none.

        Raises:
            SlowPattern: If the pattern took too long.
            UserError: If the process that matches does not start.
        """
        if self._pool is None:
            return [self._by_rule(text).strip() for text in texts]
        pattern = self.source.answer_pattern
        found = self._pool.map([(pattern, text) for text in texts], self.source.answer_timeout)
        if None in found:
            raise SlowPattern(found.index(None))
        return [text.strip() for text in found]

    def _by_rule(self, text: str) -> str:
        if self.source.answer_rule == "hashes":
            return text.rpartition("####")[2] if "####" in text else ""
        if self.source.answer_rule == "boxed":
            return without_box(text) if "\\boxed" in text or "\\fbox" in text else ""
        return text

    def close(self) -> None:
        """End the processes that match."""
        if self._pool is not None:
            self._pool.close()


def last_match(pattern: str, text: str) -> str:
    """What the one group of a pattern holds in its last match; empty without one."""
    matches = _compiled(pattern).findall(text)
    return str(matches[-1]) if matches else ""


@lru_cache(maxsize=16)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
