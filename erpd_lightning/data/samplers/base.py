"""What a sampler is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from ...errors import InvalidArgument, check_at_least
from ..settings import public_settings


class Response(NamedTuple):
    """One sampled response.

    Attributes:
        ids: Token ids, the end-of-sequence token included where it was reached.
        logps: The sampler's log-prob of each of them, in nats.
        finish_reason: `stop` (ended by itself) or `length` (cut off).
    """

    ids: list[int]
    logps: list[float]
    finish_reason: str


class Sampler(ABC):
    """Draws responses from a policy.

    Args:
        max_new_tokens: Longest response in tokens.
        temperature: What the logits are divided by; the stored log-probs are those of the tempered policy.
        batch_size: Responses that are drawn at a time.
    """

    is_trainer: bool = True
    """Whether its log-probs are those of the trainer's own model, and not of another engine such as a server."""

    def __init__(self, max_new_tokens: int = 256, temperature: float = 1.0, batch_size: int = 256) -> None:
        check_at_least(1, max_new_tokens=max_new_tokens, batch_size=batch_size)
        if not 0 < temperature < float("inf"):
            raise InvalidArgument("temperature", f"is {temperature}: it must be above 0")
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.batch_size = batch_size

    @abstractmethod
    def sample(self, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], seed: int) -> list[Response]:
        """One response to each of the tokenised prompts, in order; the same for the same seed."""

    def settings(self) -> dict[str, Any]:
        """All that responses depend on, apart from the policy, as JSON values: by default the public attributes.

        Rollouts are stored with them, and belong to a run only while they are the same.

        Raises:
            UserError: If an attribute cannot be written down.
        """
        return public_settings(self)
