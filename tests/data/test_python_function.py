"""A function of one's own: what it is called with, and what happens where it hangs, fails or gives something else."""

import sys
import time
from typing import Any

import pytest

from erpd_lightning.data.verifiers import PythonFunction, take_verdicts
from erpd_lightning.errors import UserError

FUNCTIONS = f"{__package__}.reward_functions"


def check(name: str, *responses: str, answers: Any = None, prompts: Any = None, **settings: Any) -> list[float | None]:
    verifier = PythonFunction(f"{FUNCTIONS}.{name}", **{"timeout": 5.0, **settings})
    count = len(responses)
    return take_verdicts(verifier, prompts or ["p"] * count, responses, answers or ["4"] * count).rewards


def test_it_gets_what_it_asks_for() -> None:
    assert check("plain", "4", "5") == [1.0, 0.0]
    assert check("other_names", "4", "5") == [2.0, 0.0]
    assert check("trl", "4", "5", "4", prompts=["p", "p", "skip"]) == [1.0, 0.0, None]
    assert check("with_prompts", "4", "55", prompts=["abc", ""]) == [4.0, 2.0]
    assert check("as_array", "4", "55") == [0.5, 1.0]
    assert f"{FUNCTIONS}" not in sys.modules  # It is imported by the processes alone.


def test_responses_are_handed_over_in_batches() -> None:
    assert check("counts", *"abcde") == [1.0] * 5
    assert check("counts", *"abcde", batch_size=2) == [2.0, 2.0, 2.0, 2.0, 1.0]


def test_what_hangs_dies_or_fails_is_not_checked() -> None:
    start = time.monotonic()
    responses = ["fine", "hang", "spin", "exit", "memory", "raise", "system exit", "print", "fine"]
    with pytest.warns(UserWarning, match=r"odd did not check 6 of 9 calls, first with MemoryError$"):
        assert check("odd", *responses, timeout=1.0) == [1.0, *[None] * 6, 1.0, 1.0]
    assert time.monotonic() - start < 20
    with pytest.warns(UserWarning, match="odd did not check 1 of 2 calls, in 0.5 seconds a call"):
        assert check("odd", "hang", "fine", timeout=0.5) == [None, 1.0]


def test_what_fails_for_everything_is_a_mistake() -> None:
    with pytest.raises(UserError, match=r"odd failed for all of 8 responses, first with KeyError: ") as error:
        check("odd", *["raise"] * 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("text", "odd gave a str as a reward: it must be a finite number or None"),
        ("short", "odd gave 0 rewards for 1 responses"),
        ("none", "odd gave a NoneType: it must give a list"),
        ("string", "odd gave a str: it must give a list"),
        ("nan", "^PythonFunction gave nan as the reward of response 2"),
    ],
)
def test_what_is_no_reward_is_a_mistake(what: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        check("odd", "fine", what)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("nowhere_to_be_found.f", "nowhere_to_be_found.f did not start: ModuleNotFoundError"),
        (f"{FUNCTIONS}.missing", "did not start: AttributeError: .*missing"),
        (f"{FUNCTIONS}.not_a_function", "did not start: TypeError: .* is a int, not a function"),
        (f"{FUNCTIONS}.needs_more", r"did not start: TypeError: .*tokenizer.* asks for other parameters"),
        (f"{FUNCTIONS}.one_value", "did not start: TypeError: .* asks for other parameters"),
    ],
)
def test_what_cannot_be_called_is_a_line_at_the_start(function: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        PythonFunction(function).start()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"function": "f"}, r"^function is 'f': it must be an import path"),
        ({"function": "os.system('x')"}, r"^function is"),
        ({"function": "a.b", "timeout": 0}, r"^timeout is"),
        ({"function": "a.b", "batch_size": 0}, r"^batch_size is"),
    ],
)
def test_mistakes(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        PythonFunction(**settings)
