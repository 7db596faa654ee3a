"""Text of odd characters on a terminal: what is shown of it, how wide it is, and tables of it."""

import random
import sys
import unicodedata

import pytest

from erpd_lightning.text import aligned, visible, width, wrapped

ODD = [
    "a\nb\r\tc\x1b[31m\x00\x7f\x9b",
    "日本語ｗｉｄｅ🙂🙂",
    "e\u0301 \u0301\u0302x\u20dd",
    "\u05d0\u05d1\u202e\u2066abc\u2069 \u0627\u0644",
    "half \ud83d\ude42 \udfff",
    "\u200b\u200d\ufeff\u2028\u2029\ue000\U000e0001\u0378",
    "",
]


def mixed(seed: int) -> str:
    """Any code points at all, those with meaning to a terminal often."""
    drawn = random.Random(seed)
    pool = [*"".join(ODD), *(chr(drawn.randrange(sys.maxunicode + 1)) for _ in range(60))]
    return "".join(drawn.choices(pool, k=80))


TEXTS = [*ODD, *map(mixed, range(20))]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
def test_visible_text_is_safe(encoding: str) -> None:
    for text in TEXTS:
        shown = visible(text, encoding)
        shown.encode(encoding)
        categories = {unicodedata.category(char) for char in shown}
        assert not categories & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
        assert not shown or unicodedata.category(shown[0]) not in ("Mn", "Me")


def test_visible_text_by_hand() -> None:
    assert visible("a\nb\x1b[0m") == r"a\nb\x1b[0m"
    assert visible("\u202eevil \ud800") == r"\u202eevil \ud800"
    assert visible("\u0301e\u0301\u0302") == "\\u0301e\u0301\u0302"
    assert visible("\n\u0301") == r"\n\u0301"
    assert visible("中é", "latin-1") == r"\u4e2dé"
    assert visible("שלום 中") == "שלום 中"
    assert width("中e\u0301x") == 4


@pytest.mark.parametrize("columns", [2, 3, 7, 20, 80])
def test_lines_are_as_wide_as_they_may_be_and_no_wider(columns: int) -> None:
    for text in TEXTS:
        pieces = [(visible(text[n : n + 3]), "+-."[n // 3 % 3]) for n in range(0, len(text), 3)]
        lines = wrapped(pieces, columns)
        for texts, marks in lines:
            assert width("".join(part for part, _ in texts)) == len(marks) <= columns
            assert marks == "".join(mark * width(part) for part, mark in texts)
        for _, marks in lines[:-1]:
            assert len(marks) >= columns - 1
        assert "".join(part for texts, _ in lines for part, _ in texts) == "".join(part for part, _ in pieces)


def test_columns_of_a_table_stand_below_one_another() -> None:
    assert aligned([("a", "中文"), ("123", "x")]).splitlines() == ["  a  中文", "-------", "123     x"]
