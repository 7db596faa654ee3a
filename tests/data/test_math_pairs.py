r"""Verdicts on mathematical answers: pairs of a response and a reference answer, with what the verdict has to be."""

# ruff: noqa: RUF001 - signs that look like others are what this is about.

import pytest

from erpd_lightning.data.verifiers.final_answer import final_answer, without_box
from erpd_lightning.data.verifiers.math_compare import check

RIGHT, WRONG, OPEN = 1.0, 0.0, None


def verdict(response: str, answer: str, require_box: bool = False) -> float | None:
    return check(final_answer(response, require_box), without_box(answer))


def boxed(content: str) -> str:
    return rf"So it is \boxed{{{content}}}."


# A box against a reference answer.
BOXES = [
    # Numbers
    (RIGHT, "-0.5", r"-\frac12"),
    (RIGHT, r"\dfrac{-3}{6}", "-1/2"),
    (WRONG, "0.66667", "2/30"),
    (OPEN, "0.66667", r"\frac23"),
    (WRONG, "0.667", r"\frac23"),
    (WRONG, "0.000001", "0"),
    (WRONG, r"10^{-30}", "0"),
    (WRONG, r"1+10^{-40}", "1"),
    (RIGHT, r"2^{10}", "1024"),
    (RIGHT, "2^10", "1024"),
    (WRONG, "2^10", "20"),
    (RIGHT, "4.20", "4.2"),
    (RIGHT, "25,000", "25000"),
    (RIGHT, r"25\,000", "25000"),
    (RIGHT, r"25{,}000.50", "25000.5"),
    (WRONG, "25,00", "2500"),
    (RIGHT, "7", "7."),
    (RIGHT, "seven", "7"),
    (RIGHT, "2e3", "2000"),
    (WRONG, "2e3", "2"),
    (RIGHT, r"0.1\overline{6}", r"\frac16"),
    (RIGHT, "2(3)", "6"),
    (WRONG, "2(3)", "5"),
    (RIGHT, r"\sqrt{12}", r"2\sqrt3"),
    (RIGHT, r"\sqrt[3]{8}", "2"),
    (RIGHT, r"\binom{5}{2}", "10"),
    (RIGHT, r"\log_2 8", "3"),
    (WRONG, r"\log 8", "3"),
    (RIGHT, r"|{-3}|", "3"),
    (RIGHT, r"\lfloor 3.7 \rfloor", "3"),
    (WRONG, "0/0", "0"),
    (WRONG, "1/0", r"\infty"),
    # Mixed numbers
    (RIGHT, "2 3/4", "2.75"),
    (WRONG, "2", "2 3/4"),
    (WRONG, "23/4", "2 3/4"),
    (RIGHT, r"2\frac{3}{4}", r"\frac{11}{4}"),
    (RIGHT, r"-2\frac34", "-2.75"),
    (RIGHT, "2¾", "11/4"),
    (OPEN, "3", r"2\frac{3}{2}"),
    # Signs that are not ASCII
    (RIGHT, "−3", "-3"),
    (RIGHT, "３．５", "3.5"),
    (RIGHT, "x²", "x^2"),
    (RIGHT, "10⁻³", "0.001"),
    (RIGHT, "3×10⁴", "30000"),
    (RIGHT, "5√3", r"5\sqrt{3}"),
    (WRONG, "5", "5√3"),
    (RIGHT, "⅓", "1/3"),
    (RIGHT, "۷", "7"),
    (OPEN, "-2", "3–5"),
    (RIGHT, "x ≤ 4", r"x \le 4"),
    # Units
    (RIGHT, "3 kg", r"3\,\mathrm{kg}"),
    (RIGHT, "3 kilograms", "3 kg"),
    (WRONG, "3 kg", "3 g"),
    (RIGHT, r"40\text{ km/h}", r"40 \text{ km per hour}"),
    (WRONG, r"40\text{ km/h}", r"40\text{ m/s}"),
    (RIGHT, r"9\text{ square meters}", r"9\text{ m}^2"),
    (WRONG, r"9\text{ m}", r"9\text{ m}^2"),
    (WRONG, "2", "2 thousand"),
    (RIGHT, "2000", "2 thousand"),
    (RIGHT, "4 marbles", "4"),
    (OPEN, "4 marbles", "4 coins"),
    (WRONG, "5 marbles", "4 coins"),
    (WRONG, "£3", "€3"),
    (RIGHT, r"\$1,250.00", "1250"),
    (WRONG, "30%", "0.03"),
    (OPEN, "0.3", r"30\%"),
    (WRONG, "20°F", "20°C"),
    (OPEN, "5", "5 m"),
    (RIGHT, r"\text{5 apples}", "5"),
    (WRONG, r"5\text{ at most}", "5"),
    (WRONG, r"5\text{ ft }2\text{ in}", "5 ft"),
    (WRONG, "5x", "5"),
    # Words are words
    (WRONG, "tea", "eat"),
    (WRONG, "ab", "ba"),
    (RIGHT, r"\text{Monday}", "monday"),
    (WRONG, "3", "Monday"),
    (WRONG, "March 3", "April 3"),
    (WRONG, "3", "April 3"),
    (RIGHT, r"\text{(C)}", "C"),
    (RIGHT, r"\text{(C) } 12", "C"),
    (WRONG, r"\text{(C) } 12", "D"),
    (WRONG, r"\text{never } 12", "12"),
    (OPEN, "12", "She has 12 of them left, which is more than Tom"),
    # Several answers
    (RIGHT, "3, 1", "1, 3"),
    (RIGHT, r"1 \text{ and } 3", r"\{1,3\}"),
    (WRONG, "1", "1, 3"),
    (WRONG, "1, 3, 4", "1, 3"),
    (WRONG, "(3, 1)", "(1, 3)"),
    (OPEN, "1, 3", "(1, 3)"),
    (RIGHT, r"1 \pm \sqrt{2}", r"1-\sqrt2, 1+\sqrt2"),
    (WRONG, r"1 + \sqrt{2}", r"1 \pm \sqrt{2}"),
    (RIGHT, "x = 1, x = 3", "1, 3"),
    (RIGHT, "y = 2, x = 1", "x = 1, y = 2"),
    (WRONG, "x = 2, y = 1", "x = 1, y = 2"),
    # Intervals
    (RIGHT, r"(-\infty, 2]", "x <= 2"),
    (RIGHT, r"2 \ge x", r"(-\infty, 2]"),
    (WRONG, r"(-\infty, 2)", r"(-\infty, 2]"),
    (WRONG, "2", r"(-\infty, 2]"),
    (RIGHT, r"(3,\infty) \cup (-\infty, 1)", r"(-\infty,1)\cup(3,\infty)"),
    (WRONG, r"(-\infty,1)", r"(-\infty,1)\cup(3,\infty)"),
    (RIGHT, "(1, 2)", "1 < x < 2"),
    (OPEN, "1 < x < 2", "(1, 2)"),
    (WRONG, "1 < x < 3", "(1, 2)"),
    # Algebra and equations
    (RIGHT, "(x-1)(x+1)", "x^2-1"),
    (WRONG, "x^2+1", "x^2-1"),
    (RIGHT, "y = 3 - x", "x + y = 3"),
    (RIGHT, "2x + 2y = 6", "x + y = 3"),
    (WRONG, "x + y = 4", "x + y = 3"),
    (WRONG, "3x + y = 0", "0"),
    (RIGHT, "f(x) = 2x", "2x"),
    (RIGHT, "A_{12} = 4", "4"),
    (RIGHT, r"\sin 2x", r"2 \sin x \cos x"),
    (WRONG, "|x|", "x"),
    (OPEN, "6", "1/2x"),
    (WRONG, "3 = 4", "4"),
    (RIGHT, "1 + 3 = 4", "4"),
    (RIGHT, r"\frac13 \approx 0.33", r"\frac13"),
    (WRONG, r"\frac13 \approx 0.33", "0.33"),
    (RIGHT, r"(1+i)^2", "2i"),
    # Digits that are no number
    (RIGHT, "7:45", "7:45"),
    (RIGHT, r"7:45\text{ p.m.}", "7:45 PM"),
    (WRONG, "7:45 AM", "7:45 PM"),
    (OPEN, "7:45", "7:45 PM"),
    (WRONG, "8:45", "7:45"),
    (OPEN, "1/3", "1:3"),
    (WRONG, "121_4", "121_3"),
    (OPEN, "16", "121_3"),
    (WRONG, "2010", "2024-05-09"),
    (RIGHT, r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    (WRONG, r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    # Not understood
    (OPEN, "7", "???"),
    (OPEN, "7", r"\frac{7}{"),
    (OPEN, "7", ""),
    (WRONG, "???", "7"),
    (WRONG, r"\frac{7}{", "7"),
    (WRONG, "7 8", "15"),
    (OPEN, "15", "7 8"),
]

# Whole responses.
RESPONSES = [
    (RIGHT, r"\boxed{3}, no: \boxed{4}", "4"),
    (WRONG, r"\boxed{3}, no: \boxed{4}", "3"),
    (WRONG, r"\boxed{3} or \boxed{4}", "4"),
    (WRONG, r"\boxed{3}, \boxed{4}", "3, 4"),
    (RIGHT, r"\boxed{4} (again \boxed{4})", "4"),
    (RIGHT, r"\boxed{\boxed{4}}", "4"),
    (RIGHT, r"$$\boxed{\frac{1}{2}}$$ Done in 3 steps.", "0.5"),
    (WRONG, r"\boxed{4", "4"),
    (WRONG, r"\boxed{4} and then \boxed{", "4"),
    (WRONG, r"\boxed{3}^2", "3"),
    (RIGHT, r"I think so.</think>\boxed{4}", "4"),
    (WRONG, r"\boxed{4}</think>I cannot say.", "4"),
    (WRONG, r"<think>a</think> no <think>\boxed{4}", "4"),
    (RIGHT, "It is clear. Answer: 12", "12"),
    (RIGHT, "**Final answer:** 12 apples.", "12"),
    (RIGHT, "The final answer is $12$. I hope it is correct.", "12"),
    (RIGHT, "The answer is 12 since 3 times 4 is 12.", "12"),
    (RIGHT, "<answer>12</answer>", "12"),
    (WRONG, "<answer>12", "12"),
    (RIGHT, "Some steps 3 + 4\n#### 12", "12"),
    (RIGHT, "3 * 4 = 12", "12"),
    (WRONG, "3 * 4 = 13", "13"),
    (RIGHT, "So x = 12.", "12"),
    (RIGHT, "Each costs 3 * 4 = 12 dollars.", "12"),
    (RIGHT, "12", "12"),
    (WRONG, "It is not 12", "12"),
    (WRONG, "It isn't 12.", "12"),
    (WRONG, "The answer is not 12.", "12"),
    (WRONG, "Perhaps the answer is 12.", "12"),
    (WRONG, "The answer is 12? No.", "12"),
    (WRONG, "The answer is 12. Wait, that is wrong.", "12"),
    (WRONG, "If the answer is 12, then I am a fish.", "12"),
    (WRONG, "Is it 12?", "12"),
    (WRONG, "I doubt that the answer is 12", "12"),
    (WRONG, "Your answer is 12. The correct value is 13.", "12"),
    (RIGHT, "The answer is therefore 12.", "12"),
    (WRONG, "[12]", "12"),
    (WRONG, "I have 12 of them", "12"),
    (WRONG, "1. Add. 2. Divide. 12. Done", "12"),
    (WRONG, "The answer is either 11 or 12.", "12"),
    (WRONG, "The answer is 12 minus 2.", "12"),
    (WRONG, "The answer is 12 more than 3.", "12"),
    (WRONG, "The answer is between 11 and 12", "12"),
    (WRONG, "The line x + 3y + 12 = 0", "0"),
    (WRONG, "24/2 = 12, then 12 + 24", "12"),
    (WRONG, "24/2 = 12, then 12 + 24", "36"),
    (WRONG, "There are 12 cases to try.", "12"),
    (WRONG, "The answer is 1,200", "1"),
    (WRONG, "12 * 3 = 36, so 36 / 3", "3"),
    (RIGHT, "答案是 12", "12"),
    (WRONG, "", "12"),
]


@pytest.mark.parametrize(("should", "content", "answer"), BOXES)
def test_boxes(should: float | None, content: str, answer: str) -> None:
    assert verdict(boxed(content), answer) == should


@pytest.mark.parametrize(("should", "response", "answer"), RESPONSES)
def test_responses(should: float | None, response: str, answer: str) -> None:
    assert verdict(response, answer) == should


@pytest.mark.parametrize(("should", "content", "answer"), [pair for pair in BOXES if pair[0] is not OPEN])
def test_a_reference_answer_that_is_decided_is_its_own(should: float | None, content: str, answer: str) -> None:
    assert verdict(boxed(answer), answer) == RIGHT


def test_no_answer_is_another_row_s() -> None:
    answers = [
        "7",
        "-7",
        "7/2",
        r"\sqrt{7}",
        "(7, 2)",
        r"\{7, 2\}",
        "[7, 9)",
        "x = 8",
        "x^2",
        "7 million",
        "yes",
        "B",
        "70%",
    ]
    for one in answers:
        for two in answers:
            assert (verdict(boxed(one), two) == RIGHT) == (one == two)


def test_an_answer_in_a_box_can_be_demanded() -> None:
    assert verdict("The answer is 12", "12", require_box=True) == WRONG
    assert verdict("12", "12", require_box=True) == WRONG
    assert verdict(r"\boxed{12}", "12", require_box=True) == RIGHT


@pytest.mark.parametrize(
    "answer", ["The sum 3 + 4 = 7 #### 7", r"It is \boxed{7}.", "$7$", r"\(7\)", r"\[7\]", "7.0", " 7 ", "x=7"]
)
def test_forms_of_a_reference_answer(answer: str) -> None:
    assert verdict(boxed("7"), answer) == RIGHT
    assert verdict(boxed("3"), answer) == WRONG


@pytest.mark.parametrize(
    "piece",
    [
        "(",
        "{",
        "\\boxed{",
        "\\boxed{}",
        "answer is ",
        "answer ",
        "= ",
        "is ",
        " ",
        "a",
        "1",
        ", ",
        "<think>",
        "\\frac",
        "$",
        "**",
        "| ",
    ],
)
def test_long_responses_take_no_time(piece: str) -> None:
    # The parent looks for the answer, without a time limit.
    import time

    start = time.monotonic()
    final_answer(piece * (200_000 // len(piece)))
    assert time.monotonic() - start < 2
