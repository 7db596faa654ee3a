"""Verifiers: correct, incorrect, and what could not be checked; what they may give, and what is noted of them."""

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from erpd_lightning.data.verifiers import ExactMatch, MathVerify, Verifier, take_rewards
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

VERDICTS = [
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
    ("", "7", 0.0),
    ("????", "7", 0.0),
    ("It is not 7", "7", 0.0),
    ("<think>7</think> \\boxed{8}", "7", 0.0),
]
UNSCORABLE = [("", ""), ("7", ""), ("7", "$$")]


def test_math_verify_on_real_answers() -> None:
    check = MathVerify(timeout=5.0)
    cases = [*VERDICTS, *((r, a, None) for r, a in UNSCORABLE), ("7", "7", 1.0)]
    responses, answers, _ = zip(*cases, strict=True)
    found = check(responses, answers)
    assert [*zip(responses, answers, found, strict=True)] == cases


def test_a_box_may_be_demanded() -> None:
    check = MathVerify(require_box=True)
    assert check(["The answer is 7.", r"\boxed{7}"], ["7", "7"]) == [0.0, 1.0]


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf")])
def test_a_timeout_out_of_range(timeout: float) -> None:
    with pytest.raises(UserError, match=r"^timeout is"):
        MathVerify(timeout)
    with pytest.raises(UserError, match=r"^timeout is"):
        ExactMatch(timeout=timeout)


def test_a_pattern_that_backtracks_for_ever_is_not_checked() -> None:
    check = ExactMatch("(?:a+)+(b)", timeout=0.5)
    start = time.monotonic()
    assert check(["ab", "a" * 40, "b", "aab"], ["b"] * 4) == [1.0, None, 0.0, 1.0]
    assert time.monotonic() - start < 20


# What verifiers give


class Given(Verifier):
    """Gives what a test says."""

    def __init__(self, rewards: Any) -> None:
        self.rewards = rewards

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> Any:
        return self.rewards


def test_rewards_are_taken_as_numbers() -> None:
    taken = take_rewards(Given([True, 0.5, None, -1, np.float32(2.0)]), ["r"] * 5, ["a"] * 5)
    assert taken == [1.0, 0.5, None, -1.0, 2.0]
    assert all(isinstance(reward, float | None) for reward in taken)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([1.0], "^Given gave 1 rewards for 2 responses: it must give one for each"),
        ([1.0, float("nan")], "^Given gave nan as the reward of response 2"),
        ([1.0, float("inf")], "^Given gave inf as the reward of response 2"),
        ([1.0, "1"], "^Given gave '?1'? as the reward of response 2"),
        ([10**5000, 1.0], "^Given gave something of type int that cannot be printed as the reward of response 1"),
        ([1.0, -(10**400)], "^Given gave -1000.*as the reward of response 2"),
        ([torch.tensor(1.0), 1.0], "^Given gave .*of type Tensor as the reward of response 1"),
    ],
)
def test_other_rewards_name_class_and_value(rewards: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        take_rewards(Given(rewards), ["r"] * 2, ["a"] * 2)


# Settings


def test_settings_are_json_without_addresses() -> None:
    for verifier in (MathVerify(timeout=3.0), ExactMatch(), Given([1.0])):
        verifier(["=1"], ["1"])
        text = json.dumps(verifier.settings())
        assert " at 0x" not in text
        assert "_pool" not in text
    assert MathVerify(timeout=3.0).settings() == {"timeout": 3.0, "require_box": False}
    with pytest.raises(UserError, match="rewards"):
        Given(object()).settings()
