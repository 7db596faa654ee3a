"""Verifiers: correct, incorrect, and what could not be checked; a checker that hangs or dies is replaced."""

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from erpd_lightning.data.verifiers import ExactMatch, MathVerify
from erpd_lightning.data.verifiers import math_verify as checker
from erpd_lightning.data.verifiers.math_verify import as_latex
from erpd_lightning.errors import UserError

# Exact match


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("7+5=2;2*3=6", "6", 1.0),
        ("7+5=2;2*3=6", "2", 0.0),
        ("7+5=2;2*3=6;", "6", 0.0),
        ("= 6 ", " 6", 1.0),
        ("=6\n", "6", 1.0),
        ("=-6", "-6", 1.0),
        ("=16", "6", 0.0),
        ("6", "6", 0.0),
        ("", "6", 0.0),
        ("", "", 0.0),
    ],
)
def test_exact_match(response: str, answer: str, reward: float) -> None:
    assert ExactMatch()([response, "=1"], [answer, "1"]) == [reward, 1.0]


def test_exact_match_takes_the_last_match() -> None:
    check = ExactMatch(r"<answer>(.*?)</answer>")
    text = "<answer>3</answer> no, <answer> 4 </answer>."
    assert check([text, text], ["4", "3"]) == [1.0, 0.0]


@pytest.mark.parametrize("pattern", ["=(", "=", "(a)(b)"])
def test_a_pattern_without_one_group(pattern: str) -> None:
    with pytest.raises(UserError, match=r"^pattern is"):
        ExactMatch(pattern)


def test_responses_and_answers_have_to_pair() -> None:
    with pytest.raises(ValueError, match="longer"):
        ExactMatch()(["=1"], ["1", "2"])


# math-verify

RIGHT_OR_WRONG = [
    (r"The answer is \boxed{\frac{1}{2}}.", r"\frac{1}{2}", 1.0),
    ("so it is $0.5$", r"\frac12", 1.0),
    ("so it is 1/2", "$1/2$", 1.0),
    ("so it is $2$", r"\frac{1}{2}", 0.0),
    (r"\boxed{1+2\sqrt{3}}", r"2\sqrt{3}+1", 1.0),
    ("$2$", r"2\sqrt{3}+1", 0.0),
    (r"$\sqrt{8}$", r"2\sqrt2", 1.0),
    ("2 + 5 = 7", "7", 1.0),
    ("2 + 5 = 8", "7", 0.0),
    (r"\boxed{\{2, 1\}}", "1,2", 1.0),
    (r"\boxed{(1, 2)}", "(1,2)", 1.0),
    (r"\boxed{(2, 1)}", "(1,2)", 0.0),
    ("$(1,2)$", "1<x<2", 1.0),
    ("$1<x<2$", "(1,2)", 0.0),
    ("", "7", 0.0),
    ("????", "7", 0.0),
]
NOT_CHECKED = [("", ""), ("7", ""), (r"$\{\}$", ""), ("7", "$$")]


def test_math_verify_on_real_answers() -> None:
    check = MathVerify(timeout=2.0)
    # Evaluating this tower of powers never ends.
    hanging = ("$9^{9^{9^{9}}}$", "8", None)
    cases = [*RIGHT_OR_WRONG, hanging, *((r, a, None) for r, a in NOT_CHECKED), ("7", "7", 1.0)]
    responses, answers, rewards = zip(*cases, strict=True)
    start = time.monotonic()
    assert check(responses, answers) == list(rewards)
    assert time.monotonic() - start < 60
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("answer", "latex"),
    [
        ("7", "$7$"),
        (r" \frac12 ", r"$\frac12$"),
        ("$7$", "$7$"),
        (r"\(7\)", r"\(7\)"),
        (r"\[7\]", r"\[7\]"),
        (r"so \boxed{7}", r"so \boxed{7}"),
    ],
)
def test_answers_are_put_between_delimiters(answer: str, latex: str) -> None:
    assert as_latex(answer) == latex


def serve_scripted(connection: Connection) -> None:
    """Sleeps, dies or fails where the response says so; the answer is where to write its process id."""
    connection.send("ready")
    while True:
        response, answer = connection.recv()
        Path(answer).write_text(str(os.getpid()))
        if response == "hang":
            time.sleep(600)
        if response == "crash":
            os._exit(3)
        connection.send(float(response))


def serve_nothing(connection: Connection) -> None:
    """Dies before it is ready."""
    os._exit(1)


def test_only_the_answer_that_hangs_or_crashes_is_not_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checker, "_serve_math", serve_scripted)
    responses = ["1", "hang", "0", "crash", "crash", "1"]
    files = [str(tmp_path / str(i)) for i in range(len(responses))]
    check = MathVerify(timeout=0.5)
    assert check(responses, files) == [1.0, None, 0.0, None, None, 1.0]
    pids = [int(Path(file).read_text()) for file in files]
    # A checker serves until it hangs or dies.
    assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4] != pids[5]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_checker_is_gone_also_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checker, "_serve_math", serve_scripted)
    check = MathVerify(timeout=20)
    with pytest.raises(ValueError, match="shorter"):
        check(["1", "1"], [str(tmp_path / "pid")])
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_checker_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checker, "_serve_math", serve_nothing)
    with pytest.raises(UserError, match="did not start"):
        MathVerify()(["7"], ["7"])


class Script:
    """The checker's end of the connection, with the pairs it is to receive."""

    def __init__(self, *pairs: tuple[str, str]) -> None:
        self.pairs = list(pairs)
        self.sent: list[Any] = []

    def send(self, value: Any) -> None:
        self.sent.append(value)

    def recv(self) -> tuple[str, str]:
        if not self.pairs:
            raise EOFError
        return self.pairs.pop(0)


def test_what_the_parser_trips_over_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    import math_verify

    def trip(*_: Any, **__: Any) -> bool:
        raise RecursionError

    script = Script(("7", "7"), ("8", "8"))
    monkeypatch.setattr(math_verify, "verify", trip)
    with pytest.raises(EOFError):
        checker._serve_math(script)  # type: ignore[arg-type]
    assert script.sent == ["ready", None, None]


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan")])
def test_a_timeout_out_of_range(timeout: float) -> None:
    with pytest.raises(UserError, match="timeout"):
        MathVerify(timeout)
