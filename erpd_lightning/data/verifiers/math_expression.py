r"""Expressions in LaTeX or plain notation as sympy expressions, understood token by token or not at all.

The parser that comes with math-verify reads `2(3)` as 5, `7 8` as 15 and words as products of their letters, and it
takes what it understands of a text for all of it. Numbers with decimals are exact here.
"""

import re
from collections.abc import Callable
from typing import Any

import sympy

from .math_text import Unreadable

TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|\\[A-Za-z]+|\\[{}|]|[A-Za-z]+|[-+*/^_!|()\[\]{}]")
_GREEK = """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron rho sigma tau upsilon phi
chi psi omega Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega"""
GREEK = frozenset(_GREEK.split())
_SHORT_WORDS = "not no or and is to if of in the nor but yes all any at on for so we it as by an"
NOT_PRODUCTS = frozenset(_SHORT_WORDS.split())
LONGEST_PRODUCT = 3
"""Letters in a row that are read as a product of variables; more are a word."""


def _log(argument: Any) -> Any:
    # Whether "log" is to the base e or 10 nobody says.
    return sympy.log(argument) / sympy.Symbol("log of an unsaid base", positive=True)


_FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln exp sqrt"
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    name: getattr(sympy, {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "ln": "log"}.get(name, name))
    for name in _FUNCTIONS.split()
}
FUNCTIONS["log"] = _log
INVERSES = {"sin": sympy.asin, "cos": sympy.acos, "tan": sympy.atan}
CLOSING = {"(": ")", "[": "]", "{": "}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}


def parse_expression(text: str) -> Any:
    """The sympy expression that a text is.

    Raises:
        Unreadable: If any of it is not understood, or its value is undefined.
    """
    parser = _Parser(text)
    value = parser.sum()
    if parser.position < len(parser.tokens):
        raise Unreadable(f"{parser.peek()!r} is not understood")
    if value.has(sympy.nan, sympy.zoo) or (value.has(sympy.oo) and value not in (sympy.oo, -sympy.oo)):
        raise Unreadable("its value is undefined")
    return value


class _Parser:
    """Recursive descent over the tokens of a text."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        self.position = 0
        self._bars = 0
        end = 0
        for match in TOKEN.finditer(text):
            if text[end : match.start()].strip():
                raise Unreadable(f"{text[end : match.start()]!r} is not understood")
            end = match.end()
            self.tokens.extend(_letters(match.group()) if match.group()[0].isalpha() else [match.group()])
        if text[end:].strip():
            raise Unreadable(f"{text[end:]!r} is not understood")

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def next(self) -> str:
        token = self.peek()
        if not token:
            raise Unreadable("it breaks off")
        self.position += 1
        return token

    def expect(self, token: str) -> None:
        if self.peek() != token:
            raise Unreadable(f"{self.peek() or 'the end'!r} stands where {token!r} should")
        self.position += 1

    def sum(self) -> Any:
        value = self.product()
        while self.peek() in ("+", "-"):
            value = value + self.product() if self.next() == "+" else value - self.product()
        return value

    def product(self) -> Any:
        sign = 1
        while self.peek() in ("+", "-"):
            sign *= -1 if self.next() == "-" else 1
        value = self.power()
        divided = False
        while True:
            if self.peek() in ("*", r"\cdot", r"\times"):
                self.next()
                value = value * self.signed()
                divided = False
            elif self.peek() in ("/", r"\div"):
                if divided:
                    raise Unreadable("several divisions in a row")
                self.next()
                value = value / self.signed()
                divided = True
            elif self.starts_factor():
                if divided:
                    raise Unreadable("a product after a division")
                if _is_number(self.peek()):
                    raise Unreadable("a number directly after a factor")
                value = value * self.power()
            else:
                return sign * value

    def signed(self) -> Any:
        if self.peek() in ("-", "+"):
            return -self.power() if self.next() == "-" else self.power()
        return self.power()

    def starts_factor(self) -> bool:
        token = self.peek()
        if token == "|":
            return self._bars == 0
        return bool(token) and (
            token[0].isalnum()
            or token[0] == "."
            or token in ("(", "[", "{", r"\lfloor", r"\lceil")
            or token[1:] in GREEK
            or token[1:] in FUNCTIONS
            or token in (r"\pi", r"\infty", r"\frac", r"\sqrt", r"\binom")
        )

    def power(self) -> Any:
        value = self.primary()
        while self.peek() == "!":
            self.next()
            value = sympy.factorial(value)
        if self.peek() == "^":
            self.next()
            value = value ** self.exponent()
            while self.peek() == "!":
                raise Unreadable("a factorial of a power")
        return value

    def exponent(self) -> Any:
        if self.peek() == "{":
            return self.group()
        if self.peek() in ("-", "+"):
            return -self.exponent() if self.next() == "-" else self.exponent()
        value = self.primary()
        return value ** self.exponent() if self.peek() == "^" and self.next() else value

    def group(self) -> Any:
        opened = self.next()
        bars, self._bars = self._bars, 0
        value = self.sum()
        self._bars = bars
        self.expect(CLOSING[opened])
        return value

    def argument(self) -> Any:
        r"""What a command such as `\frac` takes: a group, or a single digit or letter."""
        if self.peek() == "{":
            return self.group()
        token = self.peek()
        if token.isdigit() and len(token) > 1:
            self.tokens[self.position] = token[1:]
            return sympy.Integer(token[0])
        if token.isdigit() or token.isalpha() or token in (r"\pi", r"\sqrt", r"\frac") or token[1:] in GREEK:
            return self.primary()
        raise Unreadable(f"{token!r} stands where an argument should")

    def primary(self) -> Any:
        token = self.peek()
        name = token[1:] if token.startswith("\\") else token
        if token in ("(", "[", "{"):
            return self.group()
        if token in (r"\lfloor", r"\lceil"):
            value = self.group()
            return sympy.floor(value) if token == r"\lfloor" else sympy.ceiling(value)
        if token == "|":
            self.next()
            self._bars += 1
            value = self.sum()
            self._bars -= 1
            self.expect("|")
            return sympy.Abs(value)
        self.next()
        if _is_number(token):
            if len(token) > 1 and token[0] == "0" and token[1] != ".":
                raise Unreadable(f"{token} begins with 0")
            return sympy.Rational(token)
        if token == r"\frac":
            top = self.argument()
            return top / self.argument()
        if token == r"\binom":
            top = self.argument()
            return sympy.binomial(top, self.argument())
        if name == "sqrt":
            return self.root()
        if name in ("pi", "infty") or token in ("inf", "infinity"):
            return sympy.pi if name == "pi" else sympy.oo
        if name in FUNCTIONS:
            return self.function(name)
        if (len(token) == 1 and token.isalpha()) or (token.startswith("\\") and name in GREEK):
            return self.symbol(name)
        raise Unreadable(f"{token!r} is not understood")

    def root(self) -> Any:
        degree = sympy.Integer(2)
        if self.peek() == "[":
            degree = self.group()
        value = self.group() if self.peek() == "(" else self.argument()
        return sympy.root(value, degree) if degree != 2 else sympy.sqrt(value)

    def function(self, name: str) -> Any:
        function, power = FUNCTIONS[name], None
        if name == "log" and self.peek() == "_":
            self.next()
            base = self.argument()
            function = lambda argument: sympy.log(argument) / sympy.log(base)  # noqa: E731
        if self.peek() == "^":
            self.next()
            power = self.exponent()
            if power == -1:
                if name not in INVERSES:
                    raise Unreadable(f"{name} to the power of -1")
                function, power = INVERSES[name], None
        if self.peek() in ("(", "{"):
            argument = self.group()
            if self.peek() in ("^", "!"):
                raise Unreadable(f"a power after the argument of {name}")
        else:
            argument = self.power()
            while self.starts_factor() and self.peek().lstrip("\\") not in FUNCTIONS and not _is_number(self.peek()):
                argument = argument * self.power()
        value = function(argument)
        return value if power is None else value**power

    def symbol(self, name: str) -> Any:
        index = ""
        if self.peek() == "_":
            self.next()
            if self.peek() == "{":
                start = self.position
                while self.next() != "}":
                    pass
                index = "".join(self.tokens[start + 1 : self.position - 1])
            else:
                index = self.next()
        if name in "fghP" and self.peek() == "(":
            return sympy.Function(name + index)(self.group())
        if not index and name in ("e", "i"):
            return sympy.E if name == "e" else sympy.I
        return sympy.Symbol(f"{name}_{index}" if index else name, real=True)


def _is_number(token: str) -> bool:
    return bool(token) and (token[0].isdigit() or token[0] == ".")


def _letters(run: str) -> list[str]:
    """Letters in a row: a function, or a product of a few variables.

    Raises:
        Unreadable: If they are a word.
    """
    if len(run) == 1 or run in FUNCTIONS or run in ("pi", "inf", "infinity"):
        return [run]
    if len(run) > LONGEST_PRODUCT or run.lower() in NOT_PRODUCTS:
        raise Unreadable(f"{run!r} is a word")
    return list(run)
