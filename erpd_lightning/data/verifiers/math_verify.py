"""Comparison of mathematical answers with the package math-verify."""

import logging
import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from ...errors import InvalidArgument, UserError
from .base import Verifier

START_SECONDS = 120


class MathVerify(Verifier):
    """Compares mathematical answers with the package math-verify, in a process that can be killed.

    A reference answer is the answer alone, in LaTeX (with or without `$`) or as a number.

    Args:
        timeout: Seconds that one answer may take; a check that takes longer counts as not checked.
    """

    def __init__(self, timeout: float = 10.0) -> None:
        if not timeout > 0:
            raise InvalidArgument("timeout", f"is {timeout}: it must be above 0 seconds")
        self.timeout = timeout
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        """See `Verifier`."""
        try:
            return [self._check(*pair) for pair in zip(responses, answers, strict=True)]
        finally:
            self._stop()

    def _check(self, response: str, answer: str) -> float | None:
        connection = self._start()
        try:
            connection.send((response, answer))
            if connection.poll(self.timeout):
                result: float | None = connection.recv()
                return result
        except (EOFError, OSError):
            pass  # The checker died on this answer: it could not be checked.
        self._stop()
        return None

    def _start(self) -> Connection:
        if self._connection is None:
            context = multiprocessing.get_context("spawn")
            self._connection, child = context.Pipe()
            self._process = context.Process(target=_serve_math, args=(child,), daemon=True)
            self._process.start()
            child.close()
            # Importing the checker is not part of any answer's time.
            try:
                ready = self._connection.poll(START_SECONDS) and self._connection.recv()
            except (EOFError, OSError):
                ready = False
            if not ready:
                self._stop()
                raise UserError(
                    f"the math-verify checker did not start within {START_SECONDS} seconds: is math-verify "
                    'installed, and is the script that starts it guarded by `if __name__ == "__main__"`?'
                )
        return self._connection

    def _stop(self) -> None:
        if self._process is not None and self._connection is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
        self._process = self._connection = None


def as_latex(answer: str) -> str:
    """A reference answer as math-verify has to be given it: outside of delimiters it sees no more than numbers.

    Of a bare `2\\sqrt{3}+1` it would take the 2 for the answer, and reward it.
    """
    return answer if any(mark in answer for mark in ("$", "\\(", "\\[", "\\boxed")) else f"${answer.strip()}$"


def _serve_math(connection: Connection) -> None:
    """Answer `(response, answer)` pairs until the other end closes."""
    from math_verify import parse, verify

    # At each start it warns that its own time limit is off. The limit is kept by whoever waits for the answer.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    connection.send("ready")
    while True:
        response, answer = connection.recv()
        try:
            gold = parse(as_latex(answer), parsing_timeout=None)
            found = parse(response, parsing_timeout=None)
            result = float(verify(gold, found, timeout_seconds=None)) if gold else None
        except Exception:  # Whatever the parser trips over, the answer could not be checked.
            result = None
        connection.send(result)
