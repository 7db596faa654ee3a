"""Comparison of mathematical answers."""

from collections.abc import Sequence

from .base import Verifier
from .final_answer import final_answer, without_box
from .worker_pool import check_timeout, shared_pool


class MathVerify(Verifier):
    r"""Compares mathematical answers, in processes that can be killed.

    The reference answer is an answer alone, in LaTeX (with or without `$`) or plain notation: a number or expression,
    with or without a unit, an equation, a set, a tuple, an interval, a matrix, a choice or a few words; or a solution
    that ends in one, in a `\boxed` or after `####`. It is understood from end to end, or its rows are unscorable.

    The response's answer is looked for after its last `</think>`: what its last `\boxed` holds; without a box what it
    announces as its answer ("the answer is X", `#### X`), a last sentence "... is X" or "... = X", or a response that
    is nothing but an answer. A number that merely stands there is no answer, nor is what is denied or taken back.

    Correct is what is equal: exactly where both are numbers, algebraically otherwise (by math-verify's comparison).
    Where both name a unit, the units have to agree. Without a verdict (None) are a reference answer that is not
    understood, a check that takes too long or too much memory, and what is open: a tuple for a list, a number
    rounded to five or more decimals for an exact one, 0.25 for 25 %, a unit that is not known for another.

    Args:
        timeout: Seconds that one answer may take; a check that takes longer counts as not checked. Checks that hang
            do so beside each other, up to 64 at a time, and cost this time once.
        require_box: Whether only an answer in a box counts.
    """

    def __init__(self, timeout: float = 10.0, require_box: bool = False) -> None:
        check_timeout(timeout)
        self.timeout = timeout
        self.require_box = require_box

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        """See `Verifier`.

        Raises:
            UserError: If the process that compares does not start.
        """
        pairs = [
            (final_answer(response, self.require_box), without_box(answer))
            for response, answer in zip(responses, answers, strict=True)
        ]
        # Responses to a prompt share few answers.
        distinct = list(dict.fromkeys(pairs))
        found = shared_pool(f"{__package__}.math_check:check").map(distinct, self.timeout)
        verdicts = dict(zip(distinct, found, strict=True))
        return [verdicts[pair] for pair in pairs]

    def final_answers(self, responses: Sequence[str]) -> list[str | None]:
        """See `Verifier`: notation is made one (Unicode signs, styles, spaces), values are not: 1/2 is not 0.5 here.

        Raises:
            UserError: If the process that reads does not start.
        """
        answers = [final_answer(response, self.require_box) for response in responses]
        distinct = list(dict.fromkeys(answer for answer in answers if answer is not None))
        found = shared_pool(f"{__package__}.math_text:one_form").map([(answer,) for answer in distinct], self.timeout)
        forms = dict(zip(distinct, found, strict=True))
        return [None if answer is None else forms[answer] for answer in answers]
