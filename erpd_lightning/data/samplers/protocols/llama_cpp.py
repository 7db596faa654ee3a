"""`/completion` of llama.cpp's server."""

import math
from typing import Any

from ..base import Response
from .base import AnswerError, Draw, ServerProtocol, entry, finish_reason, logps_of, token_ids

SMALLEST_PROBABILITY = 1e-45
"""Below, a probability in float32 is 0."""


class LlamaCpp(ServerProtocol):
    """Protocol of `llama-server`: the prompt goes in as token ids, and the ids come back with their log-probs.

    Its log-probs are of the logits as they are. Those of the tempered policy are the logarithms of what is left after
    its samplers (`post_sampling_probs`), of which the temperature is the only one; at temperature 1 both are the same,
    and the first cost less.
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

    def response(self, answer: Any) -> Response:
        """See `ServerProtocol`."""
        listed = _tokens(answer)
        ids = token_ids([entry(item, "id") for item in listed], "completion_probabilities holds the id of each token")
        if entry(answer, "truncated") is True:
            raise AnswerError("ran out of context: start it with a larger --ctx-size, which its slots share")
        logps = logps_of([_logp(item) for item in listed], ids, "completion_probabilities")
        reasons = {"eos": "stop", "word": "stop", "limit": "length"}
        return Response(ids, logps, finish_reason(entry(answer, "stop_type"), reasons))

    def first_logps(self, answer: Any) -> dict[int, float]:
        """See `ServerProtocol`."""
        first = _tokens(answer)[0]
        listed = entry(first, "top_logprobs") or entry(first, "top_probs")
        if not listed:
            raise AnswerError("lists no log-probs of the most probable tokens (top_logprobs)")
        return {int(entry(item, "id")): _logp(item) for item in listed}

    def served(self, get: Any) -> tuple[str | None, str | None]:
        """See `ServerProtocol`."""
        return None, entry(get("/props"), "model_path")


def _tokens(answer: Any) -> list[Any]:
    if isinstance(answer, list):
        answer = entry(answer, 0)
    if not isinstance(answer, dict):
        raise AnswerError("gave fewer choices than it was asked for", passing=True)
    listed = answer.get("completion_probabilities")
    if not listed:
        if answer.get("tokens") == []:
            raise AnswerError("gave a response without any token", passing=True)
        raise AnswerError("gave no log-probs (completion_probabilities)")
    if not isinstance(listed, list):
        raise AnswerError("gave something else than a list of log-probs (completion_probabilities)")
    return listed


def _logp(item: Any) -> Any:
    """The log-prob of a token, of which the server gives the probability where its samplers have been at work."""
    if (probability := entry(item, "prob")) is None:
        return entry(item, "logprob")
    return math.log(max(probability, SMALLEST_PROBABILITY)) if isinstance(probability, int | float) else probability
