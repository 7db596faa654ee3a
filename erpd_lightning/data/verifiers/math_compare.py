"""Do two answers say the same? Yes, no, or nobody can tell."""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import permutations
from typing import Any

import sympy

from .math_expression import parse_expression
from .math_reading import (
    Collection,
    Equation,
    Literal,
    Matrix,
    Named,
    Quantity,
    Reading,
    Span,
    Words,
    read,
)
from .math_text import Unreadable

FEWEST_ROUNDED_DECIMALS = 5
"""Decimals from which on a rounded number may stand for the exact one: no verdict rather than a wrong one."""

DIGITS = 50
"""Digits to which constants are compared before they are compared symbolically."""

MOST_LISTED = 50
POINTS = [sympy.Rational(*p) for p in ((37, 29), (-53, 31), (71, 41), (-17, 43), (89, 47), (11, 59), (-97, 61))]


def check(answer: str | None, reference: str) -> float | None:
    """The verdict on an answer: 1.0 the same as the reference answer, 0.0 another or none, None where it is open.

    Args:
        answer: The final answer of a response, or None where it has none.
        reference: The reference answer alone, in LaTeX or plain notation.
    """
    try:
        gold = read(reference)
    except Unreadable:
        return None
    if answer is None:
        return 0.0
    if isinstance(gold, Words) and len(gold.text) == 1:
        answer = _chosen(answer)
    try:
        verdict = same(gold, read(answer))
    except Unreadable:
        return 0.0
    return None if verdict is None else float(verdict)


def _chosen(answer: str) -> str:
    r"""The letter of a choice that is given with its text: `(B) 7`, `B. 7`."""
    match = re.match(r"\s*(?:\\text\s*\{)?\s*(?:\(([A-J])\)|([A-J])[).:])\s*\S", answer)
    return (match.group(1) or match.group(2)) if match else answer


def same(gold: Reading, found: Reading) -> bool | None:
    """Whether two readings say the same; None where it is open."""
    if isinstance(gold, Named) or isinstance(found, Named):
        return _same_named(gold, found)
    for kind, compare in KINDS.items():
        if isinstance(gold, kind) and isinstance(found, kind):
            return compare(gold, found)
    return _same_across(gold, found)


def _same_named(gold: Reading, found: Reading) -> bool | None:
    if isinstance(gold, Named) and isinstance(found, Named):
        verdict = same(gold.reading, found.reading)
        return verdict if gold.name == found.name else (False if verdict is False else None)
    named, other = (gold, found) if isinstance(gold, Named) else (found, gold)
    assert isinstance(named, Named)
    if isinstance(other, Equation):
        if not isinstance(named.reading, Quantity):
            return False
        try:
            equation = Equation(parse_expression(named.name), named.reading.value)
        except Unreadable:
            return None
        return _same_equations(equation, other)
    return same(named.reading, found) if named is gold else same(gold, named.reading)


def _same_words(gold: Words, found: Words) -> bool | None:
    if gold.text == found.text:
        return True
    return None if len(gold.text) == 1 and gold.text.casefold() == found.text.casefold() else False


def _same_literals(gold: Literal, found: Literal) -> bool | None:
    if gold == found:
        return True
    if {gold.kind, found.kind} == {"time", "ratio"}:
        return None if gold.text.split()[0] == found.text.split()[0] else False
    if gold.kind == found.kind == "ratio":
        parts = [[int(p) for p in x.text.split(":")] for x in (gold, found)]
        if len(parts[0]) == len(parts[1]):
            crossed = [a * parts[1][0] == b * parts[0][0] for a, b in zip(*parts, strict=True)]
            is_time = any(
                p[0] < 24 and p[-1] >= 10 and x.text[-2] != ":" for p, x in zip(parts, (gold, found), strict=True)
            )
            return None if all(crossed) and not is_time else False
    return False


def _same_quantities(gold: Quantity, found: Quantity) -> bool | None:
    units = _same_units(gold, found)
    if units is False:
        return False
    equal = equal_values(gold.value, found.value)
    if equal is False and "%" in (gold.unit.name, found.unit.name) and gold.unit.name != found.unit.name:
        # 0.25 for 25 %: right if a fraction was asked for.
        scale = sympy.Rational(1, 100)
        pair = (gold.value * scale, found.value) if gold.unit.name == "%" else (gold.value, found.value * scale)
        return None if equal_values(*pair) else False
    if equal is False and _is_rounded(gold, found):
        return None
    return _all([equal, units])


def _same_units(gold: Quantity, found: Quantity) -> bool | None:
    one, two = gold.unit, found.unit
    if one.name == two.name:
        return True
    if not one.name or not two.name:
        return True if one.is_certain and two.is_certain else None
    return False if one.is_known and two.is_known else None


def _is_rounded(gold: Quantity, found: Quantity) -> bool:
    decimals = max(gold.decimals, found.decimals)
    if decimals < FEWEST_ROUNDED_DECIMALS or gold.value.free_symbols or found.value.free_symbols:
        return False
    difference = sympy.Abs(gold.value - found.value).evalf(DIGITS)
    return bool(difference <= sympy.Rational(1, 2 * 10**decimals))


def equal_values(one: Any, two: Any) -> bool | None:
    """Whether two expressions are equal; None where neither numbers nor algebra decide it."""
    from math_verify.grader import sympy_symbolic_eq

    if one == two:
        return True
    if one.is_Rational and two.is_Rational:
        return False
    if one.is_infinite or two.is_infinite:
        return False
    difference = one - two
    symbols = sorted(difference.free_symbols, key=str)
    if not symbols:
        if not _vanishes(difference, one):
            return False
    else:
        for shift in range(3):
            point = {s: POINTS[(shift * 2 + i) % len(POINTS)] for i, s in enumerate(symbols)}
            if _vanishes(difference.subs(point), one.subs(point)) is False:
                return False
    return True if sympy_symbolic_eq(one, two) else None


def _vanishes(difference: Any, scale: Any) -> bool | None:
    """Whether a constant is 0 up to rounding; None where it has no value."""
    value = sympy.Abs(difference).evalf(DIGITS)
    size = sympy.Abs(scale).evalf(DIGITS)
    if not (value.is_Float or value.is_Rational) or not (size.is_Float or size.is_Rational):
        return None
    return bool(value == 0 or value < sympy.Float(10, DIGITS) ** (10 - DIGITS) * size)


def _same_equations(gold: Equation, found: Equation) -> bool | None:
    one, two = (sympy.expand(e.left - e.right) for e in (gold, found))
    if one == 0 or two == 0:
        return False
    ratio = sympy.simplify(one / two)
    if not ratio.free_symbols:
        return bool(ratio.is_nonzero) or None
    return False


def _same_collections(gold: Collection, found: Collection) -> bool | None:
    if max(len(gold.items), len(found.items)) > MOST_LISTED:
        return None
    if gold.kind == found.kind == "tuple":
        if len(gold.items) != len(found.items):
            return False
        return _all(same(a, b) for a, b in zip(gold.items, found.items, strict=True))
    gold_values, found_values = _by_name(gold), _by_name(found)
    if gold_values and gold_values.keys() == found_values.keys():
        return _all(same(value, found_values[name]) for name, value in gold_values.items())
    verdict = _same_unordered(gold.items, found.items)
    if "tuple" in (gold.kind, found.kind):
        return False if verdict is False else None
    return verdict


def _by_name(collection: Collection) -> dict[str, Reading]:
    """The values of `x = 1, y = 2`; empty where not each item has a name of its own."""
    values = {item.name: item.reading for item in collection.items if isinstance(item, Named)}
    return values if len(values) == len(collection.items) else {}


def _same_unordered(gold: Sequence[Reading], found: Sequence[Reading]) -> bool | None:
    """Whether each item is among the others and the other way round."""
    return _all(
        _any(same(a, b) if ours is gold else same(b, a) for b in others)
        for ours, others in ((gold, found), (found, gold))
        for a in ours
    )


def _same_spans(gold: Span, found: Span) -> bool | None:
    if len(gold.parts) != len(found.parts):
        return None if len(gold.parts) + len(found.parts) > 2 and gold.parts[0] != found.parts[0] else False
    verdicts = [
        _all(_same_part(a, b) for a, b in zip(gold.parts, order, strict=True))
        for order in permutations(found.parts[:5])
    ]
    verdict = _any(verdicts)
    if gold.name and found.name and gold.name != found.name:
        return False if verdict is False else None
    return verdict


def _same_part(one: tuple[Any, bool, Any, bool], two: tuple[Any, bool, Any, bool]) -> bool | None:
    if (one[1], one[3]) != (two[1], two[3]):
        return False
    return _all([equal_values(one[0], two[0]), equal_values(one[2], two[2])])


def _same_matrices(gold: Matrix, found: Matrix) -> bool | None:
    if [len(row) for row in gold.rows] != [len(row) for row in found.rows]:
        return False
    return _all(
        same(a, b) for one, two in zip(gold.rows, found.rows, strict=True) for a, b in zip(one, two, strict=True)
    )


def _same_across(gold: Reading, found: Reading) -> bool | None:
    """Readings of two kinds: not the same, unless one may be meant as the other."""
    for one, two in ((gold, found), (found, gold)):
        if isinstance(one, Collection) and one.kind == "set" and len(one.items) == 1:
            return False if same(one.items[0], two) is False else None
        if isinstance(one, Collection) and one.kind == "tuple" and isinstance(two, Span):
            return _tuple_as_interval(one, two, gold_is_span=two is gold)
        if isinstance(one, Literal) and isinstance(two, Quantity):
            return _literal_as_number(one, two)
        if isinstance(one, Matrix) and isinstance(two, Collection):
            flat = Collection("tuple", tuple(item for row in one.rows for item in row))
            return None if len(flat.items) == len(two.items) and min(map(len, [one.rows, one.rows[0]])) == 1 else False
    return False


def _tuple_as_interval(pair: Collection, span: Span, gold_is_span: bool) -> bool | None:
    if len(pair.items) != 2 or len(span.parts) != 1:
        return False
    values = [item.value for item in pair.items if isinstance(item, Quantity)]
    if len(values) != 2:
        return False
    verdict = _same_part((values[0], False, values[1], False), span.parts[0])
    return verdict if gold_is_span or verdict is False else None


def _literal_as_number(literal: Literal, quantity: Quantity) -> bool | None:
    """`1:2` and `1/2`, `1010_2` and 10 or 1010: open. A date is no number."""
    if literal.kind == "ratio":
        first, second, *rest = (int(p) for p in literal.text.split(":"))
        return None if not rest and second and equal_values(sympy.Rational(first, second), quantity.value) else False
    if literal.kind == "base":
        digits, base = literal.text.split("_")
        meant = [int(digits)] if digits.isdigit() else []
        if 2 <= int(base) <= 36 and all(int(d, 36) < int(base) for d in digits):
            meant.append(int(digits, int(base)))
        return None if quantity.value in meant else False
    return False


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    """False if one is, otherwise None if one is."""
    open_ = False
    for verdict in verdicts:
        if verdict is False:
            return False
        open_ |= verdict is None
    return None if open_ else True


def _any(verdicts: Iterable[bool | None]) -> bool | None:
    """True if one is, otherwise None if one is."""
    open_ = False
    for verdict in verdicts:
        if verdict:
            return True
        open_ |= verdict is None
    return None if open_ else False


KINDS: dict[type, Callable[[Any, Any], bool | None]] = {
    Words: _same_words,
    Literal: _same_literals,
    Quantity: _same_quantities,
    Equation: _same_equations,
    Collection: _same_collections,
    Span: _same_spans,
    Matrix: _same_matrices,
}
