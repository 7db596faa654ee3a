"""`/generate` of SGLang's server."""

from collections.abc import Callable
from typing import Any

from ..base import Response
from .base import AnswerError, Draw, ServerProtocol, entry, finish_reason, logps_of, token_ids


class SGLang(ServerProtocol):
    """Protocol of SGLang's own endpoint: `input_ids` go in, and each token comes back as log-prob and id.

    Its log-probs are those of the tempered policy. It draws from the seed of a request only where it was started with
    `--enable-deterministic-inference`.
    """

    name = "SGLang"
    completion_path = "/generate"
    raw_logps_hint = "it takes a version whose output log-probs are of the tempered policy"

    def request(self, draw: Draw, top: int = 0) -> dict[str, Any]:
        """See `ServerProtocol`."""
        return {
            "input_ids": list(draw.prompt_ids),
            "sampling_params": {
                "max_new_tokens": draw.max_new_tokens,
                "temperature": draw.temperature,
                "sampling_seed": draw.seed,
                "stop_token_ids": list(draw.ends),
                "n": 1,
                "top_p": 1.0,
                "top_k": -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "skip_special_tokens": False,
                "no_stop_trim": True,
            },
            "return_logprob": True,
            "logprob_start_len": -1,
            "top_logprobs_num": top,
            "stream": False,
        }

    def response(self, answer: Any, draw: Draw, ask: Callable[[dict[str, Any]], Any]) -> Response:
        """See `ServerProtocol`."""
        answer = _only(answer)
        pairs = entry(answer, "meta_info", "output_token_logprobs")
        if not pairs:
            if entry(answer, "meta_info", "completion_tokens") == 0:
                raise AnswerError("gave a response without any token", passing=True)
            raise AnswerError("gave no log-probs (output_token_logprobs)")
        ids = token_ids([entry(pair, 1) for pair in pairs], "output_token_logprobs holds log-prob and id of each token")
        if (own := entry(answer, "output_ids")) is not None and own != ids:
            raise AnswerError(f"gave {len(own)} token ids that are not those of its {len(ids)} log-probs")
        logps = logps_of([entry(pair, 0) for pair in pairs], ids, "output_token_logprobs")
        reason = finish_reason(
            entry(answer, "meta_info", "finish_reason", "type"), {"stop": "stop", "length": "length"}
        )
        return Response(ids, logps, reason)

    def first_logps(self, answer: Any) -> dict[int, float]:
        """See `ServerProtocol`."""
        listed = entry(_only(answer), "meta_info", "output_top_logprobs", 0)
        if not isinstance(listed, list) or not listed:
            raise AnswerError("lists no log-probs of the most probable tokens (output_top_logprobs)")
        return {int(entry(item, 1)): float(entry(item, 0)) for item in listed}

    def served(self, get: Any) -> tuple[str | None, str | None]:
        """See `ServerProtocol`."""
        info = get("/get_model_info") or get("/model_info")
        return None, entry(info, "model_path")


def _only(answer: Any) -> Any:
    """Answers to one prompt come alone or in a list of one."""
    if isinstance(answer, list):
        answer = entry(answer, 0)
    if not isinstance(answer, dict):
        raise AnswerError("gave fewer choices than it was asked for", passing=True)
    return answer
