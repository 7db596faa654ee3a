r"""Mathematical notation in one form: Unicode signs and digits as LaTeX, no styles, numbers without separators."""

# ruff: noqa: RUF001 - signs that look like others are what this is about.

import re
import unicodedata
from typing import NamedTuple

from .final_answer import closing_brace

TEXT_START, TEXT_END = "\ue000", "\ue001"
"""What stands around words that LaTeX sets as text."""

SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni", strict=True))
SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()", strict=True))
SIGNS = {
    **dict.fromkeys("−‒–—﹣－", "-"),
    **dict.fromkeys("×✕✖", r"\times "),
    **dict.fromkeys("·⋅∙•", r"\cdot "),
    **dict.fromkeys("÷", r"\div "),
    **dict.fromkeys("∕⁄", "/"),
    "∞": r"\infty ",
    "≤": r"\le ",
    "⩽": r"\le ",
    "≥": r"\ge ",
    "⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "°": r"^\circ ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "∠": r"\angle ",
    "¢": TEXT_START + "cents" + TEXT_END,
    "，": ", ",
    "、": ", ",
    "；": "; ",
    "。": "",
}
GREEK = {chr(code): unicodedata.name(chr(code)).rsplit(" ", 1)[-1].lower() for code in range(0x3B1, 0x3CA)}
GREEK.update({"λ": "lambda", "ς": "sigma"})
CURRENCIES = {r"\$": "$", "$": "$", "£": "£", "€": "€", "¥": "¥", "₹": "₹", r"\pounds": "£", r"\euro": "€"}

TEXT_COMMAND = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|textsf|mathrm|mathbf|mathit|mathsf|mbox|hbox|operatorname)\*?\s*(?=\{)"
)
STYLE = re.compile(
    r"(?<!\\)\\(?:left|right|middle|bigl|bigr|Bigl|Bigr|biggl|biggr|Biggl|Biggr|big|Big|bigg|Bigg|displaystyle|textstyle|"
    r"limits|mathstrut|phantom\{[^{}]*\}|quad|qquad|,|;|:| |~)(?![A-Za-z])"
)
RENAMED = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "frac"),
    **dict.fromkeys(("dbinom", "tbinom"), "binom"),
    **dict.fromkeys(("leq", "leqslant"), "le"),
    **dict.fromkeys(("geq", "geqslant"), "ge"),
    **dict.fromkeys(("lt",), "<"),
    **dict.fromkeys(("gt",), ">"),
    **dict.fromkeys(("neq",), "ne"),
    **dict.fromkeys(("varnothing",), "emptyset"),
    **dict.fromkeys(("ast",), "cdot"),
    **dict.fromkeys(("lvert", "rvert", "vert"), "|"),
    **dict.fromkeys(("lbrack",), "["),
    **dict.fromkeys(("rbrack",), "]"),
    **dict.fromkeys(("lbrace",), "{"),
    **dict.fromkeys(("rbrace",), "}"),
    **dict.fromkeys(("land",), " and "),
    **dict.fromkeys(("lor",), " or "),
    "varphi": "phi",
    "varepsilon": "epsilon",
    "iff": "=",
}
COMMAND = re.compile(r"\\([A-Za-z]+)")
GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+|(?:\.\d{3}){2,})(?![\d]|,\d|\.\d+,)")
REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
SCIENTIFIC = re.compile(r"(?<![A-Za-z\d.])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,4})(?![\d.A-Za-z])")
MIXED = re.compile(
    r"(?<![\d./^_\\A-Za-z}])(\d+)(?:\s+(\d+)\s*/\s*(\d+)|\s*\\frac\s*(?:\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)(\d)))(?![\d/.^])"
)

SPACE_AROUND_SIGN = re.compile(r"\s*([^\w\s])\s*")
"""A sign with the space around it, which says nothing; between two numbers or words it does."""


class Unreadable(ValueError):
    """A text that is not understood from end to end."""


class Cleaned(NamedTuple):
    """A text in the one form, and the currency that stood before it (or "")."""

    text: str
    currency: str


def clean(text: str) -> Cleaned:
    """A text in the one form.

    Raises:
        Unreadable: If delimiters do not pair, or a mixed number is none.
    """
    text = _unicode(text.strip())
    text = text.strip().strip("*").strip()
    text, currency = _currency(_undelimited(text))
    text = _texts(text)
    text = text.replace(r"\!", "").replace("{,}", ",").replace("~", " ").replace(r"\\%", "%").replace(r"\%", "%")
    text = re.sub(r"(?<=\d)\\[,; ](?=\d{3})", " ", text)
    text = STYLE.sub(" ", text)
    text = COMMAND.sub(_renamed, text)
    text = re.sub(r"\s+", " ", text).strip()
    while text.startswith("{") and closing_brace(text, 0) == len(text):
        text = text[1:-1].strip()
    text = re.sub(r"[.,;:]+$", "", text).strip()
    if not any(bracket in text for bracket in "([{") or re.fullmatch(r"[^\[({]*\d[\d, .]*[^\d]*", text):
        text = GROUPED.sub(lambda m: re.sub(r"[ ,.]", "", m.group()), text)
    text = REPEATING.sub(_repeating, text)
    text = SCIENTIFIC.sub(lambda m: f"({m.group(1)} \\cdot 10^{{{int(m.group(2))}}})", text)
    return Cleaned(MIXED.sub(_mixed, text), currency)


def one_form(answer: str) -> str:
    """An answer in a form in which others that are written in nearly the same way are the same string."""
    try:
        text, currency = clean(answer)
    except Unreadable:
        text, currency = answer.strip(), ""
    return currency + SPACE_AROUND_SIGN.sub(r"\1", text)


def _unicode(text: str) -> str:
    # A dash between two numbers is a range, not a difference.
    if re.search(r"\d\s?[–—]\s?\d", text):
        raise Unreadable("a range")
    text = re.sub(
        f"[{''.join(SUPERSCRIPTS)}]+", lambda m: "^{" + "".join(SUPERSCRIPTS[c] for c in m.group()) + "}", text
    )
    text = re.sub(f"[{''.join(SUBSCRIPTS)}]+", lambda m: "_{" + "".join(SUBSCRIPTS[c] for c in m.group()) + "}", text)
    done = []
    for index, char in enumerate(text):
        if char in SIGNS:
            done.append(SIGNS[char])
        elif char in GREEK:
            done.append(f"\\{GREEK[char]} ")
        elif unicodedata.category(char) == "Nd":
            done.append(str(unicodedata.decimal(char)))
        elif unicodedata.category(char) == "No" and "⁄" in unicodedata.normalize("NFKC", char):
            top, bottom = unicodedata.normalize("NFKC", char).split("⁄")
            mixed = index > 0 and text[index - 1 : index].isdigit()
            done.append(f" {top}/{bottom}" if mixed else f"\\frac{{{top}}}{{{bottom}}}")
        elif char in "√∛∜":
            done.append({"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}[char])
        elif unicodedata.category(char) in ("Cf", "Cc") and char not in "\n\t":
            continue
        else:
            done.append(unicodedata.normalize("NFKC", char) if ord(char) > 0x7F else char)
    return re.sub(r"(\\sqrt(?:\[\d\])?)\s*\(([^()]*)\)", r"\1{\2}", "".join(done))


def _undelimited(text: str) -> str:
    r"""Text without `$`, `\(` and `\[` around mathematics; a lone `$` is a currency."""
    text = text.replace("$$", "$")
    dollars = list(re.finditer(r"(?<!\\)\$", text))
    if len(dollars) % 2 == 0:
        parts = re.split(r"(?<!\\)\$", text)
        # Money: $5 and $7. Mathematics starts and ends at the dollars.
        if not all(re.fullmatch(r"\s*[\d,.]+\s*(?:,|and|or)\s*", p) for p in parts[1::2]) or len(parts) == 1:
            text = "".join(
                p if inside else f" {p} " for inside, p in zip([n % 2 for n in range(len(parts))], parts, strict=True)
            )
        else:
            raise Unreadable("several sums of money")
    for left, right in ((r"\(", r"\)"), (r"\[", r"\]")):
        if text.count(left) != text.count(right):
            raise Unreadable("delimiters that do not pair")
        text = text.replace(left, " ").replace(right, " ")
    return text.strip()


def _currency(text: str) -> tuple[str, str]:
    match = re.match(r"(-?)\s*(?:US)?(\\\$|\$|£|€|¥|₹|\\pounds\b|\\euro\b)\s*(?=[-\d.])", text)
    if match:
        text, sign = match.group(1) + text[match.end() :], CURRENCIES[match.group(2)]
    else:
        match = re.search(r"(?<=\d)\s*(\\\$|\$|£|€|¥|₹)$", text)
        if not match:
            return text, ""
        text, sign = text[: match.start()], CURRENCIES[match.group(1)]
    if re.search(r"\$|£|€|¥|₹", text):
        raise Unreadable("several sums of money")
    return text, sign


def _texts(text: str) -> str:
    """Words that are set as text get marks around them; a single letter is a letter."""
    while match := TEXT_COMMAND.search(text):
        end = closing_brace(text, match.end())
        if end < 0:
            raise Unreadable("a brace that is not closed")
        content = text[match.end() + 1 : end - 1].replace(TEXT_START, "").replace(TEXT_END, "")
        plain = content.strip()
        if re.fullmatch(r"and|or", plain.strip(",; ")):
            content = f" {plain.strip(',; ')} "
        elif plain[:1].isdigit():
            content = f" {plain} "  # \text{7 apples}
        elif re.search(r"[A-Za-z]{2}", plain) or (re.fullmatch(r"[A-Za-z]", plain) and text[: match.start()].strip()):
            content = TEXT_START + content + TEXT_END
        text = text[: match.start()] + content + text[end:]
    return text


def _renamed(match: re.Match[str]) -> str:
    name = RENAMED.get(match.group(1))
    if name is None:
        return match.group()
    return f"\\{name}" if name.isalpha() or name in ("{", "}") else f" {name} "


def _repeating(match: re.Match[str]) -> str:
    whole, fixed, repeated = match.groups()
    bottom = (10 ** len(repeated) - 1) * 10 ** len(fixed)
    top = int((whole or "0") + fixed + repeated) - int((whole or "0") + fixed)
    return f"\\frac{{{top}}}{{{bottom}}}"


def _mixed(match: re.Match[str]) -> str:
    whole, *rest = match.groups()
    top, bottom = (int(part) for part in rest if part is not None)
    if not 0 < top < bottom:
        raise Unreadable("a mixed number or a product")
    return f"({whole}+\\frac{{{top}}}{{{bottom}}})"
