"""`/v1/completions` of vLLM's server."""

from collections.abc import Callable
from typing import Any

from ..base import Response
from .base import AnswerError, Draw, ServerProtocol, entry, finish_reason, logps_of, token_ids

TOKEN_PREFIX = "token_id:"


class VLLM(ServerProtocol):
    """Protocol of `vllm serve`: token ids go in as `prompt` and come back with `return_token_ids`.

    Its log-probs are raw unless it was started with `--logprobs-mode processed_logprobs`. All settings of sampling are
    said in each request, because the server takes what is missing from the policy's `generation_config.json`.
    """

    name = "vLLM"
    completion_path = "/v1/completions"
    raw_logps_hint = "start it with --logprobs-mode processed_logprobs"

    def request(self, draw: Draw, top: int = 0) -> dict[str, Any]:
        """See `ServerProtocol`."""
        body = {
            "prompt": list(draw.prompt_ids),
            "max_tokens": draw.max_new_tokens,
            "temperature": draw.temperature,
            "seed": draw.seed,
            "stop_token_ids": list(draw.ends),
            "n": 1,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logprobs": max(top, 1),
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
            "add_special_tokens": False,
            "stream": False,
        }
        return body if draw.model is None else {"model": draw.model, **body}

    def response(self, answer: Any, draw: Draw, ask: Callable[[dict[str, Any]], Any]) -> Response:
        """See `ServerProtocol`."""
        choice = _choice(answer)
        ids = token_ids(choice.get("token_ids"), "it takes a vLLM that knows return_token_ids")
        logps = logps_of(entry(choice, "logprobs", "token_logprobs"), ids, "it takes a vLLM that gives logprobs")
        reason = finish_reason(choice.get("finish_reason"), {"stop": "stop", "length": "length"})
        return Response(ids, logps, reason)

    def first_logps(self, answer: Any) -> dict[int, float]:
        """See `ServerProtocol`."""
        listed = entry(_choice(answer), "logprobs", "top_logprobs", 0)
        if not isinstance(listed, dict) or not all(name.startswith(TOKEN_PREFIX) for name in listed):
            raise AnswerError("lists no log-probs of the most probable tokens by their ids (top_logprobs)")
        return {int(name.removeprefix(TOKEN_PREFIX)): float(logp) for name, logp in listed.items()}

    def served(self, get: Any) -> tuple[str | None, str | None]:
        """See `ServerProtocol`."""
        models = get("/v1/models")
        return entry(models, "data", 0, "id"), entry(models, "data", 0, "root")


def _choice(answer: Any) -> dict[str, Any]:
    choice = entry(answer, "choices", 0)
    if not isinstance(choice, dict):
        raise AnswerError("gave fewer choices than it was asked for", passing=True)
    return choice
