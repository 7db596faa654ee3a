"""What an answer says: a quantity, an equation, a set, a tuple, an interval, a matrix, or words."""

# ruff: noqa: RUF001 - signs that look like others are what this is about.

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from .math_expression import parse_expression
from .math_text import TEXT_END, TEXT_START, Unreadable, clean
from .math_units import UNITLESS, Unit, split_unit

MOST_WORDS = 6
LONGEST_ANSWER = 2000
_NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty"""
NUMBER_WORDS = _NUMBERS.split()


@dataclass(frozen=True)
class Words:
    """Words, or a single letter: a choice, a name, yes or no."""

    text: str


@dataclass(frozen=True)
class Literal:
    """Digits that are no number: a date, a time (`2:30 pm`), a ratio (`2:30`), a number in a base (`1010_2`)."""

    kind: str
    text: str


@dataclass(frozen=True)
class Quantity:
    """A number or expression with its unit; `decimals` of one that is written with a decimal point."""

    value: Any
    unit: Unit = UNITLESS
    decimals: int = 0


@dataclass(frozen=True)
class Named:
    """`x = 3`, `f(2) = 3`."""

    name: str
    reading: "Reading"


@dataclass(frozen=True)
class Equation:
    """An equation that says more than what a name stands for."""

    left: Any
    right: Any


@dataclass(frozen=True)
class Collection:
    """Several answers: a `list` (`1, 2`), a `set` or a `tuple`."""

    kind: str
    items: tuple["Reading", ...]


@dataclass(frozen=True)
class Span:
    """An interval or a union of them: `(low, is closed, high, is closed)` each; `name` of the variable, if any."""

    parts: tuple[tuple[Any, bool, Any, bool], ...]
    name: str = ""


@dataclass(frozen=True)
class Matrix:
    """Rows of readings."""

    rows: tuple[tuple["Reading", ...], ...]


Reading = Words | Literal | Quantity | Named | Equation | Collection | Span | Matrix

RELATION = re.compile(r"<=|>=|=|<|>|\\le\b|\\ge\b|\\ne\b|\\approx\b|\\equiv\b|\\sim\b|\\cong\b")
NAME = re.compile(
    r"(?:\\angle\s*[A-Z]{1,3}|m?\|?[A-Z]{2,3}\|?|(?:[A-Za-z]|\\[a-z]+)'*\s*(?:_(?:\w|\{[^{}]*\}))?\s*(?:\([^()=]*\))?"
    rf"|{TEXT_START}[A-Za-z ]+{TEXT_END})"
)
ENVIRONMENT = re.compile(r"\\begin\{([pbvB]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}")


def read(text: str) -> Reading:
    """What an answer says.

    Raises:
        Unreadable: If any of it is not understood.
    """
    if len(text) > LONGEST_ANSWER:
        raise Unreadable("it is too long")
    cleaned = clean(text)
    return _read(cleaned.text, cleaned.currency)


def _read(text: str, currency: str = "") -> Reading:
    text = text.strip()
    if not text:
        raise Unreadable("it is empty")
    for special in (_words, _literal, _matrix):
        if not currency and (reading := special(text)):
            return reading
    items = _split(text, (",", ";", "and", "or"))
    if len(items) > 1:
        if currency:
            raise Unreadable("several sums of money")
        return _collect("list", items)
    if match := re.match(r"[A-Za-z]\s*\\in\b", text):
        return Named(text[0], _read(text[match.end() :]))
    relation = _relation(text)
    if relation is not None:
        return relation
    if "\\cup" in text:
        spans = [_read(part) for part in _split(text, ("\\cup",))]
        parts = [part for span in spans for part in _span(span).parts]
        return Span(tuple(parts))
    if bracketed := _bracketed(text):
        return bracketed
    return _quantity(text, currency)


def _words(text: str) -> Words | None:
    bare = text.replace(TEXT_START, "").replace(TEXT_END, "").strip().rstrip(".")
    if choice := re.fullmatch(r"\(?([A-Za-z])\)?", bare):
        return Words(choice.group(1))
    if bare in (r"\emptyset", r"\mathbb{R}", r"\mathbb{Z}"):
        return Words(bare)
    marked = re.sub(f"{TEXT_START}[^{TEXT_END}]*{TEXT_END}", "", text).strip(" .") == ""
    if marked and not re.search(r"[A-Za-z]", bare):
        return None
    # A date such as "May 5" is words with digits.
    if re.fullmatch(r"[^\W\d][^\W\d]+(?:[ '’-]+[^\W\d]+)*(?: \d{1,2}(?:, \d{4})?)?", bare):
        if bare in ("pi", "inf", "infinity") or bare.casefold() in NUMBER_WORDS:
            return None
        if " and " in bare or " or " in bare or len(bare.split()) > MOST_WORDS:
            raise Unreadable("prose")
        return Words(" ".join(re.sub("[’-]", " ", bare).casefold().split()))
    return None


def _literal(text: str) -> Literal | Quantity | None:
    if re.fullmatch(r"\d+(?:\s*:\s*\d+)+", text):
        return Literal("ratio", re.sub(r"\s", "", text))
    time = re.fullmatch(
        r"(\d{1,2}:\d{2})\s*([ap])\.?m\.?", re.sub(f"[{TEXT_START}{TEXT_END}]", "", text), re.IGNORECASE
    )
    if time:
        return Literal("time", f"{time.group(1)} {time.group(2).lower()}m")
    if re.fullmatch(r"\d{4}-\d{1,2}-\d{1,2}|\d{1,2}/\d{1,2}/\d{4}", text):
        return Literal("date", text)
    if match := re.fullmatch(r"([0-9A-Fa-f]+)\s*_\s*(?:\{\s*(\d+)\s*\}|(\d+))", text):
        return Literal("base", f"{match.group(1).upper()}_{match.group(2) or match.group(3)}")
    return None


def _matrix(text: str) -> Matrix | None:
    match = ENVIRONMENT.fullmatch(text)
    if match is None:
        return None
    rows = [row for row in re.split(r"\\\\", match.group(2)) if row.strip()]
    read_rows = tuple(tuple(_read(cell) for cell in row.split("&")) for row in rows)
    if match.group(1) == "vmatrix" or len({len(row) for row in read_rows}) != 1:
        raise Unreadable("a determinant, or rows of unequal length")
    return Matrix(read_rows)


def _split(text: str, separators: Sequence[str]) -> list[str]:
    """Parts of a text between separators that stand in no bracket.

    Raises:
        Unreadable: If brackets do not pair or a part is empty.
    """
    marks = "|".join(rf"(?<![A-Za-z\\]){s}(?![A-Za-z])" if s.isalpha() else re.escape(s) for s in separators)
    parts, start, depth = [], 0, 0
    for match in re.finditer(rf"\\begin\b|\\end\b|\\[{{}}]|[()\[\]{{}}]|{marks}", text):
        token = match.group()
        if token in ("(", "[", "{", r"\{", r"\begin"):
            depth += 1
        elif token in (")", "]", "}", r"\}", r"\end"):
            depth -= 1
        elif depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    if depth != 0:
        raise Unreadable("brackets that do not pair")
    parts.append(text[start:])
    if len(parts) > 2:  # "1, 2, and 3"
        parts = [p for i, p in enumerate(parts) if p.strip() or i in (0, len(parts) - 1)]
    if len(parts) > 1 and not all(p.strip() for p in parts):
        raise Unreadable("an empty part")
    return parts


def _collect(kind: str, items: Sequence[str]) -> Reading:
    readings: list[Reading] = []
    for item in items:
        reading = _read(item)
        # "x = 1 or x = 2" and "1 ± √2, 3" are longer lists.
        readings.extend(
            reading.items
            if isinstance(reading, Collection) and reading.kind == "list" and kind != "tuple"
            else [reading]
        )
    names = {r.name if isinstance(r, Named) else "" for r in readings}
    if kind == "list" and len(names) == 1 and "" not in names and isinstance(readings[0], Named):
        values = tuple(r.reading for r in readings if isinstance(r, Named))
        return Named(readings[0].name, Collection("list", values))
    return Collection(kind, tuple(readings))


def _bracketed(text: str) -> Reading | None:
    r"""`\{1, 2\}`, `(1, 2)`, `[1, 2)`."""
    if text.startswith(r"\{") and text.endswith(r"\}"):
        inside = text[2:-2]
        if not inside.strip():
            return Words(r"\emptyset")
        if re.search(r"\||:|\\mid", inside):
            raise Unreadable("a set by its property")
        return _collect("set", _split(inside, (",", ";")))
    if text[0] not in "([" or text[-1] not in ")]":
        return None
    try:
        items = _split(text[1:-1], (",", ";"))
    except Unreadable:
        return None  # (1+2)(3+4)
    if len(items) == 1:
        if text[0] == "[":
            raise Unreadable("a single item in square brackets")
        return None
    closed = text[0] == "[", text[-1] == "]"
    readings = [_read(item) for item in items]
    values: list[Any] = [r.value for r in readings if isinstance(r, Quantity)]
    if len(items) == len(values) == 2:
        low, high = values
        if closed != (False, False) or sympy.oo in values or -sympy.oo in values:
            if closed == (True, True) and not bool(sympy.simplify(low - high).is_negative):
                raise Unreadable("an interval or a list in brackets")
            return Span(((low, closed[0], high, closed[1]),))
    if closed != (False, False):
        raise Unreadable("a list in square brackets")
    return Collection("tuple", tuple(readings))


def _span(reading: Reading) -> Span:
    if isinstance(reading, Span):
        return reading
    if isinstance(reading, Collection) and reading.kind in ("tuple", "set"):
        values = [item.value for item in reading.items if isinstance(item, Quantity)]
        if len(values) == len(reading.items):
            if reading.kind == "set":
                return Span(tuple((value, True, value, True) for value in values))
            if len(values) == 2:
                return Span(((values[0], False, values[1], False),))
    raise Unreadable("a union of what are no intervals")


def _relation(text: str) -> Reading | None:
    marks, parts, depth, start = [], [], 0, 0
    for match in re.finditer(rf"\\[{{}}]|[()\[\]{{}}]|{RELATION.pattern}", text):
        token = match.group()
        if token in ("(", "[", "{", r"\{"):
            depth += 1
        elif token in (")", "]", "}", r"\}"):
            depth -= 1
        elif depth == 0:
            marks.append(token)
            parts.append(text[start : match.start()].strip())
            start = match.end()
    if not marks:
        return None
    parts.append(text[start:].strip())
    if not parts[0] and len(parts) == 2 and marks == ["="]:
        return _read(parts[1])  # "= 7"
    if not all(parts):
        raise Unreadable("a relation with one side")
    if r"\approx" in marks:
        # What is rounded is not the answer where the exact value stands before it.
        first = marks.index(r"\approx")
        named = first == 0 and NAME.fullmatch(parts[0])
        return _relation_of(["="], [parts[0], parts[1]]) if named else _chain(marks[:first], parts[: first + 1])
    return _chain(marks, parts)


def _chain(marks: list[str], parts: list[str]) -> Reading:
    return _relation_of(marks, parts) if marks else _read(parts[0])


def _relation_of(marks: list[str], parts: list[str]) -> Reading:
    if all(mark == "=" for mark in marks):
        return _equality(parts)
    if all(mark in ("<", ">", "<=", ">=", r"\le", r"\ge") for mark in marks):
        return _inequality(marks, parts)
    raise Unreadable("a relation that is not understood")


def _equality(parts: list[str]) -> Reading:
    names = [NAME.fullmatch(part) and not re.fullmatch(r"[eEi]|\\pi", part) for part in parts]
    last = _read(parts[-1])
    between = [_read(part) for part in parts[1:-1] if not NAME.fullmatch(part)]
    if names[0]:
        _check_chain([*between, last])
        name = re.sub(r"\s|[{}\ue000\ue001]", "", parts[0])
        return last if parts[0].startswith(TEXT_START) else Named(name, last)
    first = _read(parts[0])
    if _is_constant(first) and _is_constant(last):
        _check_chain([first, *between, last])
        return last
    if names[-1] and len(parts) == 2 and _is_constant(first):
        return Named(parts[-1], first)
    if len(parts) == 2 and isinstance(first, Quantity | Words) and isinstance(last, Quantity | Words):
        return Equation(parse_expression(parts[0]), parse_expression(parts[1]))
    raise Unreadable("a chain of equations")


def _check_chain(readings: Sequence[Reading]) -> None:
    """`2 + 5 = 8` has no answer.

    Raises:
        Unreadable: If constants that are said to be equal are not.
    """
    values = [r.value for r in readings if isinstance(r, Quantity) and not r.value.free_symbols]
    if any(abs((value - values[-1]).evalf(30)) > sympy.Rational(1, 10**20) for value in values[:-1]):
        raise Unreadable("an equation that does not hold")


def _is_constant(reading: Reading) -> bool:
    return isinstance(reading, Quantity) and not reading.value.free_symbols


def _inequality(marks: list[str], parts: list[str]) -> Reading:
    rising = [mark in ("<", "<=", r"\le") for mark in marks]
    if len(set(rising)) != 1:
        raise Unreadable("inequalities in two directions")
    if not rising[0]:
        marks, parts = marks[::-1], parts[::-1]
    closed = [mark not in ("<", ">") for mark in marks]
    variables = [i for i, part in enumerate(parts) if NAME.fullmatch(part)]
    if len(variables) != 1 or len(parts) > 3:
        raise Unreadable("an inequality without a single variable")
    place = variables[0]
    bounds = [None if i == place else _bound(part) for i, part in enumerate(parts)]
    low = (bounds[place - 1], closed[place - 1]) if place > 0 else (-sympy.oo, False)
    high = (bounds[place + 1], closed[place]) if place + 1 < len(parts) else (sympy.oo, False)
    if place in (0, len(parts) - 1) and len(parts) == 3:
        raise Unreadable("an inequality without a single variable")
    return Span(((*low, *high),), parts[place])


def _bound(text: str) -> Any:
    reading = _read(text)
    if not _is_constant(reading):
        raise Unreadable("a bound that is no number")
    return reading.value  # type: ignore[union-attr]


def _quantity(text: str, currency: str) -> Reading:
    if text.casefold() in NUMBER_WORDS:
        return Quantity(sympy.Integer(NUMBER_WORDS.index(text.casefold())))
    number, unit = split_unit(text, currency)
    if number.count(r"\pm") == 1:
        sides = [parse_expression(number.replace(r"\pm", sign)) for sign in "+-"]
        return Collection("list", tuple(Quantity(value * unit.factor, unit) for value in sides))
    # A unit in a fraction: \frac{5 km}{h} is not understood, 5 \frac{km}{h} is.
    if match := re.search(
        rf"\s*\\frac\{{\s*({TEXT_START}[^{{}}]*{TEXT_END})\s*\}}\{{\s*({TEXT_START}[^{{}}]*{TEXT_END})\s*\}}$", number
    ):
        if unit.name:
            raise Unreadable("two units")
        number, unit = split_unit(f"{number[: match.start()]} {match.group(1)}/{match.group(2)}", currency)
    value = parse_expression(number)
    decimal = re.fullmatch(r"-?\s*\d*\.(\d+)", number.strip())
    if isinstance(value, sympy.Basic) and unit.factor != 1:
        value = value * sympy.Rational(unit.factor.numerator, unit.factor.denominator)
    return Quantity(value, unit, len(decimal.group(1)) if decimal else 0)
