"""Text for terminals: aligned tables, escapes for characters that cannot be shown, and lines with marks below."""

import unicodedata
from collections.abc import Iterable, Sequence

ESCAPED_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories that a terminal interprets, reorders, or draws in a width of its own choice."""

ZERO_WIDTH_CATEGORIES = {"Mn", "Me"}
"""Unicode categories of marks that are drawn over the character before them."""


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Table of rows with equally many cells: right-aligned columns, a rule below the first row."""
    widths = [max(width(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(" " * (columns - width(c)) + c for c, columns in zip(row, widths, strict=True)) for row in rows]
    lines = [line.rstrip() for line in lines]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def visible(text: str, encoding: str = "utf-8", *, lines: bool = False) -> str:
    r"""Text in which everything that a terminal would interpret or could not show is escaped.

    Control and format characters (also those that change the direction of writing), line ends, unpaired surrogates,
    unassigned and private characters become escapes such as `\n` or `\u202e`; so do combining marks without a
    character to stand on, and what the encoding lacks.

    Args:
        text: Any string.
        encoding: Encoding of the terminal or file.
        lines: Whether line ends stay as they are.
    """
    shown: list[str] = []
    for char in text:
        category = unicodedata.category(char)
        is_loose = category in ZERO_WIDTH_CATEGORIES and (not shown or len(shown[-1]) > 1)
        safe = category not in ESCAPED_CATEGORIES and not is_loose and _encodable(char, encoding)
        safe = safe or (lines and char == "\n")
        shown.append(char if safe else char.encode("unicode_escape").decode())
    return "".join(shown)


def width(text: str) -> int:
    """Number of terminal columns that a visible text takes."""
    return sum(_columns(char) for char in text)


def wrapped(marked: Iterable[tuple[str, str]], columns: int) -> list[tuple[list[tuple[str, str]], str]]:
    """Lines of visible texts with a mark each.

    Args:
        marked: Texts, each with a mark of one column.
        columns: Greatest number of columns of a line; at least 2, which the widest characters take.

    Returns:
        For each line its texts with their marks, and the line of marks: each stands under all columns of its text.
    """
    lines: list[tuple[list[tuple[str, str]], str]] = []
    texts: list[tuple[str, str]] = []
    marks = ""
    for text, mark in marked:
        part = ""
        for char in text:
            if len(marks) + _columns(char) > columns:
                lines.append(([*texts, (part, mark)] if part else texts, marks))
                texts, marks, part = [], "", ""
            part += char
            marks += mark * _columns(char)
        texts.append((part, mark))
    return [*lines, (texts, marks)] if marks else lines


def _columns(char: str) -> int:
    if unicodedata.category(char) in ZERO_WIDTH_CATEGORIES:
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _encodable(char: str, encoding: str) -> bool:
    try:
        char.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
