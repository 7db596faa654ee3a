"""Rewards of a plain Python function, called in processes that can be killed."""

import re
import warnings
from collections.abc import Sequence

from ...errors import InvalidArgument, UserError, check_at_least
from .base import Verdicts, Verifier
from .worker_pool import check_timeout, shared_pool

IMPORT_PATH = re.compile(r"(?:[^\W\d]\w*\.)+[^\W\d]\w*")

FEWEST_FAILED = 8
"""Calls that must all have failed before the function, and not the responses, is to blame."""


class PythonFunction(Verifier):
    """Calls a function of one's own for the rewards, as `reward_func(completions, **kwargs)` of TRL.

    The function gets lists and gives a list of as many numbers, None for what it could not check. What it gets are the
    parameters that it names: `responses` or `completions`, `answers` or `answer`, and `prompts` (chat messages as
    JSON); with `**kwargs` all of `completions`, `answer` and `prompts`; two parameters of other names are the responses
    and the answers.

    It runs in processes of its own, which are ended when a call takes too long; they import its module, and this
    process does not. A response whose call hangs, fails or takes more than 2 GiB is not checked, which is warned about
    and counted.

    Args:
        function: Import path, such as `my_module.my_function`.
        timeout: Seconds that one call may take.
        batch_size: Responses of a call; those of a call that hangs or fails are not checked together.
    """

    def __init__(self, function: str, timeout: float = 10.0, batch_size: int = 1) -> None:
        if not IMPORT_PATH.fullmatch(function):
            raise InvalidArgument("function", f"is {function!r}: it must be an import path, as my_module.my_function")
        check_timeout(timeout)
        check_at_least(1, batch_size=batch_size)
        self.function = function
        self.timeout = timeout
        self.batch_size = batch_size

    def start(self) -> None:
        """See `Verifier`.

        Raises:
            UserError: If the function cannot be imported, or does not take responses and answers.
        """
        shared_pool(f"{__package__}.function_call:load", self.function).start()

    def verify(self, prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str]) -> Verdicts:
        """See `Verifier`.

        Raises:
            UserError: If the function fails for everything, or does not give a list of as many rewards.
        """
        columns = [list(column) for column in (prompts, responses, answers)]
        starts = range(0, len(responses), self.batch_size)
        calls = [tuple(column[first : first + self.batch_size] for column in columns) for first in starts]
        found = shared_pool(f"{__package__}.function_call:load", self.function).map(calls, self.timeout)
        failed = [reply["error"] for reply in found if reply is not None and "error" in reply]
        if len(failed) == len(calls) >= FEWEST_FAILED:
            raise UserError(f"{self.function} failed for all of {len(responses)} responses, first with {failed[0]}")
        rewards: list[float | None] = []
        for (_, part, _), reply in zip(calls, found, strict=True):
            if reply is not None and "problem" in reply:
                raise UserError(f"{self.function} gave {reply['problem']}")
            rewards += [None] * len(part) if reply is None or "error" in reply else reply["rewards"]
        if lost := [reply for reply in found if reply is None or "error" in reply]:
            why = f"first with {failed[0]}" if failed else f"in {self.timeout:g} seconds a call"
            warnings.warn(f"{self.function} did not check {len(lost)} of {len(calls)} calls, {why}", stacklevel=2)
        return Verdicts(rewards, {})

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        """See `Verifier`; the prompts are left empty."""
        return self.verify([""] * len(responses), responses, answers).rewards
