"""What a server's protocol is."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...http import ServerError
from ..base import Response

IMPOSSIBLE_LOGP = -9000.0
"""What servers write for minus infinity, which JSON has no number for, lies below; no sampled token has such a one."""


class AnswerError(ServerError):
    """An answer that no response can be taken from.

    Args:
        problem: What is wrong with it, as the rest of a sentence that begins with the server.
        passing: Whether asking again may help.
    """

    def __init__(self, problem: str, passing: bool = False) -> None:
        super().__init__(problem, passing)


@dataclass(frozen=True)
class Draw:
    """A response to be drawn.

    Attributes:
        prompt_ids: Token ids of the prompt.
        max_new_tokens: Longest response in tokens.
        temperature: What the logits are divided by.
        seed: Seed of the draw, of 31 bits.
        ends: Token ids that end the response.
        model: What the server calls the policy, or None for its only one.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    temperature: float
    seed: int
    ends: Sequence[int]
    model: str | None = None


class ServerProtocol(ABC):
    """How a server is asked for responses.

    Attributes:
        name: What the server is called.
        completion_path: Where responses are asked for.
        health_path: Where a server that is ready answers with status 200.
        top_count: How many of the most probable first tokens are asked for when log-probs are checked.
        raw_logps_hint: What to do about log-probs that are not those of the tempered policy.
    """

    name: ClassVar[str]
    completion_path: ClassVar[str]
    health_path: ClassVar[str] = "/health"
    top_count: ClassVar[int] = 8
    raw_logps_hint: ClassVar[str]

    @abstractmethod
    def request(self, draw: Draw, top: int = 0) -> dict[str, Any]:
        """The body of a request.

        Args:
            draw: What to draw.
            top: How many of the most probable tokens are to be listed at each position, beside the sampled one.
        """

    @abstractmethod
    def response(self, answer: Any, draw: Draw, ask: Callable[[dict[str, Any]], Any]) -> Response:
        """The response that an answer holds.

        Args:
            answer: The answer.
            draw: What was to be drawn.
            ask: Gives the server's answer to the body of a further request, for what this one lacks.

        Raises:
            AnswerError: If token ids, log-probs or the reason why it ended are missing.
        """

    @abstractmethod
    def first_logps(self, answer: Any) -> dict[int, float]:
        """Log-probs of the listed tokens at the first position, in nats, by token id; none where another draw has them.

        Raises:
            AnswerError: If there are none.
        """

    @abstractmethod
    def served(self, get: Any) -> tuple[str | None, str | None]:
        """What the server calls its policy in requests, and the folder or hub name that it was loaded from.

        Args:
            get: Gives the JSON value that lies at a path of the server, or None where there is none.
        """


def entry(answer: Any, *path: str | int) -> Any:
    """What lies at a path of keys and indices in a JSON value; None where there is nothing."""
    for key in path:
        if isinstance(key, str) and isinstance(answer, Mapping):
            answer = answer.get(key)
        elif isinstance(key, int) and isinstance(answer, list) and -len(answer) <= key < len(answer):
            answer = answer[key]
        else:
            return None
    return answer


def token_ids(ids: Any, hint: str) -> list[int]:
    """Token ids as they were answered.

    Raises:
        AnswerError: If they are missing, or something else than numbers; the hint says what would help.
    """
    if ids is None:
        raise AnswerError(f"gave text without token ids: {hint}")
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise AnswerError(f"gave {_shown(ids)} where token ids were asked for: {hint}")
    if not ids:
        raise AnswerError("gave a response without any token", passing=True)
    return ids


def logps_of(values: Any, ids: Sequence[int], hint: str) -> list[float]:
    """One log-prob for each token.

    Raises:
        AnswerError: If there are none, too few or too many of them, or something else than log-probs.
    """
    if not values:
        raise AnswerError(f"gave no log-probs: {hint}")
    if not isinstance(values, list) or len(values) != len(ids):
        count = len(values) if isinstance(values, list) else _shown(values)
        raise AnswerError(f"gave {count} log-probs for {len(ids)} tokens")
    for value in values:
        if not isinstance(value, int | float) or not math.isfinite(value) or not IMPOSSIBLE_LOGP < value < 1e-3:
            raise AnswerError(f"gave the log-prob {_shown(value)} of a token that it drew")
    return [min(float(value), 0.0) for value in values]


def finish_reason(reason: Any, known: Mapping[str, str]) -> str:
    """`stop` or `length`, from what the server calls it.

    Raises:
        AnswerError: For another reason; asking again may help, since servers end what they abort with one.
    """
    if not isinstance(reason, str) or reason not in known:
        raise AnswerError(f"ended a response for the reason {_shown(reason)}", passing=True)
    return known[reason]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
