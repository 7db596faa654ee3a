"""Units of a quantity: split off, and in one spelling."""

import re
from fractions import Fraction
from typing import NamedTuple

from .math_text import TEXT_END, TEXT_START, Unreadable

SCALES = {
    "dozen": 12,
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
SPELLINGS = {
    "mm": "millimeter millimeters millimetre millimetres",
    "cm": "centimeter centimeters centimetre centimetres cms",
    "m": "meter meters metre metres",
    "km": "kilometer kilometers kilometre kilometres kms",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards",
    "mi": "mile miles",
    "mg": "milligram milligrams",
    "g": "gram grams",
    "kg": "kilogram kilograms kgs",
    "lb": "lbs pound pounds",
    "oz": "ounce ounces",
    "ml": "mL milliliter milliliters millilitre millilitres",
    "l": "L liter liters litre litres",
    "gal": "gallon gallons",
    "s": "sec secs second seconds",
    "min": "mins minute minutes",
    "h": "hr hrs hour hours",
    "day": "days",
    "week": "weeks",
    "month": "months",
    "year": "years yr yrs",
    "°": "degree degrees deg",
    "%": "percent percentage pct",
    "$": "dollar dollars USD usd",
    "¢": "cent cents",
    "€": "euro euros EUR",
    "£": "GBP",
    "mph": "",
    "kmh": "kph kmph",
    "Hz": "hertz",
    "N": "newton newtons",
    "J": "joule joules",
    "W": "watt watts",
    "V": "volt volts",
    "K": "kelvin",
    "": "unit units",
}
KNOWN = {word: unit for unit, words in SPELLINGS.items() for word in [*words.split(), unit] if word}
KNOWN.update({word: word for word in SCALES})
_NO_UNIT = """plus minus times divided less more than not and or over by to if is of from but with squared cubed mod
modulo sin cos tan cot sec csc ln log exp sqrt pi inf infinity at most least
about around approximately nearly almost up each"""
NO_UNIT = frozenset(_NO_UNIT.split())
POWERS = {"square": "^2", "sq": "^2", "cubic": "^3", "squared": "^2", "cubed": "^3"}

_POWER = r"(?:\s*\^\s*(?:\{\s*\d\s*\}|\d))?"
_TEXT = rf"{TEXT_START}[^{TEXT_START}{TEXT_END}]*{TEXT_END}{_POWER}"
_WORD = rf"(?<![A-Za-z\\])[A-Za-z]+\.?{_POWER}"
_ITEM = rf"(?:{_TEXT}|{_WORD})"
TRAILING = re.compile(rf"\s*({_ITEM}(?:(?:\s*(?:/|\\cdot)\s*|\s*){_ITEM})*)$")
DEGREES = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*([CF]?)$")
ATOM = re.compile(r"([A-Za-z°%$¢€£]+)\.?(?:\s*\^\s*\{?\s*(\d)\s*\}?)?|(/)|\\cdot")


class Unit(NamedTuple):
    """A unit.

    Attributes:
        name: In one spelling; "" where there is none.
        factor: What the number is to be multiplied by ("5 million").
        is_known: Whether it is a unit of measurement, not any noun.
        is_certain: Whether it can be nothing but a unit (the `m` of `5 m` may be a variable).
    """

    name: str = ""
    factor: Fraction = Fraction(1)
    is_known: bool = True
    is_certain: bool = True


UNITLESS = Unit()


def split_unit(text: str, currency: str = "") -> tuple[str, Unit]:
    """A number or expression, and the unit after it.

    Raises:
        Unreadable: If it has a unit and a currency, or words that are no unit.
    """
    if match := DEGREES.search(text):
        return text[: match.start()], _only(Unit("°" + match.group(1)), currency)
    if match := re.search(r"\s*%$", text):
        return text[: match.start()], _only(Unit("%"), currency)
    match = _trailing(text)
    if match is None:
        return text, Unit(currency)
    words = match.group(1)
    number = text[: match.start()]
    if TEXT_START not in words and not _is_bare_unit(words, text[: match.start(1)]):
        return text, Unit(currency)
    unit = _unit(words)
    if TEXT_START not in words and re.fullmatch(r"[A-Za-z]", words):
        unit = unit._replace(is_certain=False)
    if currency and not unit.name:
        return number, Unit(currency, unit.factor)
    return number, _only(unit, currency)


def _trailing(text: str) -> re.Match[str] | None:
    """The words at the end, from the first that stands after a number or is set as text."""
    for match in re.finditer(rf"(?<=[\d)}}!\s])(?=\s*{_ITEM})|(?={TEXT_START})|(?<=\\pi)(?=\s)", text):
        found = TRAILING.match(text, match.start())
        if found and text[: found.start()].strip():
            return found
    return None


def _is_bare_unit(words: str, before: str) -> bool:
    """Whether words that are not set as text are a unit: after a space any noun, otherwise a known unit."""
    names = re.findall(r"[A-Za-z]+", words)
    if any(name in NO_UNIT and name not in POWERS for name in names) or not re.search(r"\d[)}]*\s*$", before):
        return False
    if before.endswith(" "):
        return all(name in KNOWN or len(name) > 2 for name in names)
    return all(name in KNOWN and len(name) > 1 for name in names)


def _only(unit: Unit, currency: str) -> Unit:
    if currency and unit.name and unit.name != currency:
        raise Unreadable("a currency and a unit")
    return unit


def _unit(words: str) -> Unit:
    words = words.replace(TEXT_START, " ").replace(TEXT_END, " ")
    words = re.sub(r"\s+\^", "^", words).replace(r"^\circ", "°").replace("-", " ")
    factor = Fraction(1)
    names: list[str] = []
    known = True
    position = 0
    power = ""
    for match in ATOM.finditer(words):
        if words[position : match.start()].strip():
            raise Unreadable(f"{words!r} is no unit")
        position = match.end()
        word = match.group(1)
        if word is None:
            names.append("/" if match.group(3) else "")
            continue
        if word.lower() in SCALES and not names:
            factor *= SCALES[word.lower()]
        elif word == "per":
            names.append("/")
        elif word.lower() in ("square", "sq", "cubic"):
            power = POWERS[word.lower()]
        elif word.lower() in ("squared", "cubed") and names:
            names[-1] += POWERS[word.lower()]
        elif word in ("of", "in", "a", "an", "the") and names:
            known = False
            names.append(word)
        elif word.lower() in NO_UNIT:
            raise Unreadable(f"{word!r} is no unit")
        else:
            name = KNOWN.get(word, KNOWN.get(word.lower()) if len(word) > 2 else None)
            known &= name is not None
            name = word.lower() if name is None else name
            names.append(name + (f"^{match.group(2)}" if match.group(2) else power) if name else "")
            power = ""
    if words[position:].strip():
        raise Unreadable(f"{words!r} is no unit")
    return Unit(" ".join(name for name in names if name), factor, known)
