"""What a sampler is."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

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
        stop: Strings that end a response where it says them, for policies that do not end their turns themselves, such
            as base models. They are part of the response.

    Attributes:
        needs_model: Whether `sample` draws from the language model that it is given, whose log-probs are then the
            trainer's own. Another engine draws from the policy in a folder, within `serving`; whoever samples need not
            load it, and the trainer computes the log-probs of what was drawn once more.
        operational_arguments: Arguments of the class that say how responses are got, and change none of them: a run
            may go on with others.
    """

    needs_model: ClassVar[bool] = True
    operational_arguments: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self, max_new_tokens: int = 256, temperature: float = 1.0, batch_size: int = 256, stop: Sequence[str] = ()
    ) -> None:
        check_at_least(1, max_new_tokens=max_new_tokens, batch_size=batch_size)
        if not 0 < temperature < float("inf"):
            raise InvalidArgument("temperature", f"is {temperature}: it must be above 0")
        if isinstance(stop, str) or not all(stop):
            raise InvalidArgument("stop", f"is {stop!r}: a list of strings is expected, none of them empty")
        self.stop = list(stop)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.batch_size = batch_size

    @abstractmethod
    def sample(self, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], seed: int) -> list[Response]:
        """One response to each of the tokenised prompts, in order; the same for the same seed."""

    @contextmanager
    def serving(self, policy: str | Path, folder: Path, device: int | None = None) -> Iterator[None]:
        """While responses of a policy that lies in a folder are drawn: what that takes is there, and goes afterwards.

        Args:
            policy: Folder or hub name of the policy.
            folder: Where anything that is to be read later, such as a log, may be written.
            device: The only CUDA device that may be used, where other processes sample on others; None for all.
        """
        yield

    @property
    def in_process(self) -> "Sampler":
        """A sampler of the same distribution for a policy that is in memory and nowhere else, as in training."""
        return self

    def settings(self) -> dict[str, Any]:
        """All that responses depend on, apart from the policy, as JSON values: public attributes, not the operational.

        Rollouts are stored with them, and belong to a run only while they are the same.

        Raises:
            UserError: If an attribute cannot be written down.
        """
        return {k: value for k, value in public_settings(self).items() if k not in self.operational_arguments}
