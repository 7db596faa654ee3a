"""`/completion` of llama.cpp's server."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..base import Response
from .base import AnswerError, Draw, ServerProtocol, entry, finish_reason, logps_of, token_ids

SMALLEST_PROBABILITY = 1e-45
"""Below, a probability in float32 is 0."""

ALL_TOKENS = 10_000_000
"""More tokens than any vocabulary has: all of them are listed."""

FORCING_BIAS = 1e4
"""Nats that leave no other token a chance."""


class LlamaCpp(ServerProtocol):
    """Protocol of `llama-server`: the prompt goes in as token ids, and the ids come back with their log-probs.

    Its log-probs are of the logits as they are. Those of the tempered policy are the logarithms of what is left after
    its samplers (`post_sampling_probs`), of which the temperature is the only one; at temperature 1 both are the same,
    and the first cost less.

    It gives the ids of all tokens, but no log-probs of those after which its text ends within a character, such as all
    but the last of an emoji's. Each of them is asked for by itself, as one of all log-probs after what comes before it.
    """

    name = "llama.cpp"
    completion_path = "/completion"
    top_count = 64
    raw_logps_hint = "it takes a llama-server that knows post_sampling_probs"

    def request(self, draw: Draw, top: int = 0) -> dict[str, Any]:
        """See `ServerProtocol`."""
        return {
            "prompt": list(draw.prompt_ids),
            "n_predict": draw.max_new_tokens,
            "temperature": draw.temperature,
            "seed": draw.seed,
            "samplers": ["temperature"],
            "n_probs": max(top, 1),
            "post_sampling_probs": draw.temperature != 1.0,
            "return_tokens": True,
            "cache_prompt": True,
            "stream": False,
            # Of what it answers beside these, the whole prompt as text is the longest.
            "response_fields": ["tokens", "completion_probabilities", "stop_type", "truncated"],
        }

    def response(self, answer: Any, draw: Draw, ask: Callable[[dict[str, Any]], Any]) -> Response:
        """See `ServerProtocol`."""
        listed = _listed(answer)
        ids = token_ids(entry(_only(answer), "tokens"), "it takes a llama-server that knows return_tokens")
        if entry(_only(answer), "truncated") is True:
            raise AnswerError("ran out of context: start it with a larger --ctx-size, which its slots share")
        known = _aligned([entry(item, "id") for item in listed], ids)
        values = [
            _logp(listed[known[i]]) if i in known else self._one_logp(token, ids[:i], draw, ask)
            for i, token in enumerate(ids)
        ]
        logps = logps_of(values, ids, "completion_probabilities")
        reasons = {"eos": "stop", "word": "stop", "limit": "length"}
        return Response(ids, logps, finish_reason(entry(_only(answer), "stop_type"), reasons))

    def _one_logp(
        self, token: int, before: Sequence[int], draw: Draw, ask: Callable[[dict[str, Any]], Any]
    ) -> float | None:
        """The log-prob of a token after others, of the raw log-probs of all tokens; None if it is not among them."""
        context = replace(draw, prompt_ids=[*draw.prompt_ids, *before], max_new_tokens=1, temperature=1.0)
        # An end token is drawn: its text ends within no character.
        body = {**self.request(context, ALL_TOKENS), "logit_bias": [[draw.ends[0], FORCING_BIAS]]}
        raw = self.first_logps(ask(body))
        if not raw:
            raise AnswerError("gave no log-probs (completion_probabilities)")
        if token not in raw:
            return None
        tempered = [logp / draw.temperature for logp in raw.values()]
        highest = max(tempered)
        total = highest + math.log(sum(math.exp(logp - highest) for logp in tempered))
        return raw[token] / draw.temperature - total

    def first_logps(self, answer: Any) -> dict[int, float]:
        """See `ServerProtocol`."""
        listed = _listed(answer)
        if not listed:  # The drawn token ends within a character.
            return {}
        first = listed[0]
        top = entry(first, "top_logprobs") or entry(first, "top_probs")
        if not top:
            raise AnswerError("lists no log-probs of the most probable tokens (top_logprobs)")
        return {int(entry(item, "id")): _logp(item) for item in top}

    def served(self, get: Any) -> tuple[str | None, str | None]:
        """See `ServerProtocol`."""
        return None, entry(get("/props"), "model_path")


def _only(answer: Any) -> dict[str, Any]:
    """Answers to one prompt come alone or in a list of one."""
    if isinstance(answer, list):
        answer = entry(answer, 0)
    if not isinstance(answer, dict):
        raise AnswerError("gave fewer choices than it was asked for", passing=True)
    return answer


def _listed(answer: Any) -> list[Any]:
    """The tokens that log-probs are given of."""
    listed = _only(answer).get("completion_probabilities") or []
    if not isinstance(listed, list):
        raise AnswerError("gave something else than a list of log-probs (completion_probabilities)")
    return listed


def _aligned(listed: Sequence[Any], ids: Sequence[int]) -> dict[int, int]:
    """Which of the listed tokens a token is, for those of which that is certain.

    Some are left out of the list, in an order that is otherwise theirs. Where matching from the left and from the right
    disagree, as where one of two equal tokens is missing, nothing is said.

    Raises:
        AnswerError: If the list holds other tokens.
    """
    left, right = _matched(listed, ids), _matched(listed[::-1], ids[::-1])
    if left is None or right is None:
        raise AnswerError(f"gave log-probs of tokens that are not those of its response, {len(listed)} for {len(ids)}")
    mirrored = {len(ids) - 1 - i: len(listed) - 1 - j for i, j in right.items()}
    return {i: j for i, j in left.items() if mirrored.get(i) == j}


def _matched(listed: Sequence[Any], ids: Sequence[int]) -> dict[int, int] | None:
    """The first place in `ids` for each of the listed tokens, in order; None where one has none."""
    found: dict[int, int] = {}
    for i, token in enumerate(ids):
        if len(found) < len(listed) and listed[len(found)] == token:
            found[i] = len(found)
    return found if len(found) == len(listed) else None


def _logp(item: Any) -> Any:
    """The log-prob of a token, of which the server gives the probability where its samplers have been at work."""
    if (probability := entry(item, "prob")) is None:
        return entry(item, "logprob")
    return math.log(max(probability, SMALLEST_PROBABILITY)) if isinstance(probability, int | float) else probability
