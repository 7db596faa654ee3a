"""Final answers as verifiers find them for majority votes: equal answers are one string, different ones are not."""

# ruff: noqa: RUF001 - signs that look like others are what this is about.

from itertools import combinations

import pytest

from erpd_lightning.data.verifiers import ExactMatch, MathVerify, Unverified


@pytest.mark.parametrize(
    "responses",
    [
        [r"So \boxed{ \frac{1}{2} }", r"\boxed{\dfrac{1}{2}}", r"The answer is $\frac{1}{2}$."],
        [r"\boxed{1,234}", r"\boxed{1234}", "The answer is 1234"],
        [r"\boxed{(1, 2)}", r"\boxed{( 1,2 )}", r"\boxed{\left(1,\,2\right)}"],
        [r"\boxed{x^{2} − 1}", r"\boxed{x²-1}"],
    ],
)
def test_forms_of_one_answer(responses: list[str]) -> None:
    found = MathVerify().final_answers(responses)
    assert None not in found
    assert len(set(found)) == 1, found


def test_different_answers() -> None:
    boxes = [
        "1",
        "-1",
        "10",
        "1 0",
        "(1, 2)",
        "(12)",
        "1/2",
        "12",
        "1 1/2",
        "11/2",
        r"\sin x",
        "a b",
        "ab",
        "–",
        "5 – 7",
    ]
    found = MathVerify().final_answers([rf"\boxed{{{box}}}" for box in boxes])
    assert not [pair for pair in combinations(zip(boxes, found, strict=True), 2) if pair[0][1] == pair[1][1]]


def test_no_answer() -> None:
    assert MathVerify().final_answers(["Is it 7?", "<think> 7"]) == [None, None]
    assert MathVerify(require_box=True).final_answers(["The answer is 7.", r"\boxed{7}"]) == [None, "7"]
    assert Unverified().final_answers(["7"]) is None


def test_exact_match_takes_what_it_compares() -> None:
    assert ExactMatch().final_answers(["1=2;3= 4 ", "=4", "4"]) == ["4", "4", None]
    slow = ExactMatch("(a+)+b", timeout=0.5)
    assert slow.final_answers(["a" * 40]) == [None]
