"""A parser's long complaint as one line that names the key, what is wrong with it, and what would be right."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

UNKNOWN = re.compile(
    r"unrecognized arguments: --([\w.+-]+)"
    r"|^(?:Subcommand '\w+'|Group '(\w+)') does not accept option '([^']+)'"
    r"|^Option '([^']+)' is not accepted"
)

WORDING = (
    (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
    (r"\bNoneType\b", "null"),
    (r"(?:typing\.)?Literal\[(.*?)\]", r"one of \1"),
    (r"^Unable to load config '(.*?)'.*", r"\1 is no configuration file"),
    (r"^Expected a dot import path string: (.*)", r"\1 is no class path"),
    (r"^Import path (?:\S+ )?does not correspond to a subclass of", "expected a subclass of"),
    (r"^Not a valid subclass of (\w+)", r"expected \1"),
    (r"^Expected an? ", "expected "),
    (r"\. Got value: ?(.*)", r", not \1"),
)
"""jsonargparse's words, and those of someone who writes a configuration file."""

MOST_SHOWN = 60
"""Characters of a value that is repeated to the user."""


def readable(error: BaseException, options: Iterable[str] = (), bound: Iterable[str] = ()) -> str:
    """One line of what jsonargparse says.

    Args:
        error: What it raised.
        options: All options there are, to guess which of them was meant.
        bound: Keys that are no options because the program fills them in.
    """
    text = str(error).strip()
    if unknown := UNKNOWN.search(text):
        argument, group, nested, plain = unknown.groups()
        key = argument or plain or (f"{group}.{nested}" if group else nested)
        return unknown_option(key, options, bound)
    return _explain(text)


def unknown_option(key: str, options: Iterable[str], bound: Iterable[str] = ()) -> str:
    """A line about an option that does not exist, with the one that was probably meant."""
    if key in bound:
        return f"{key} is no option: the chain of stages sets it"
    options = sorted(options)
    leaf = key.rpartition(".")[2]
    guesses = [option for option in options if option.rpartition(".")[2] == leaf]
    guesses = guesses or get_close_matches(key, options, n=1, cutoff=0.75)
    hint = f"did you mean {' or '.join(guesses)}?" if guesses else "--help lists all that there are"
    return f"{key} is no option: {hint}"


def naming(key: str, message: str) -> str:
    """The message with the key in front, unless it names it already."""
    return message if not key or message.startswith(key) else f"{key}: {message}"


def _explain(text: str, key: str = "") -> str:
    """What is wrong with the value of a key; the reasons nest as classes and their arguments do."""
    if found := re.match(r'\s*Parser key "([^"]+)":\s*', text):
        return _explain(text[found.end() :], f"{key}.{found[1]}" if key else found[1])
    _, _, reasons = text.partition("Errors:\n")
    if not re.match(r"\s*- ", reasons):
        return naming(key, _plain(text))
    reasons, _, given = reasons.rpartition("Given value type:")
    bullets = _bullets(reasons)
    for bullet in bullets:  # A class was named: that the value is of no other type tells nothing.
        if found := re.match(r"Problem with given class_path '(.*?)':\s*", bullet):
            inside = bullet[found.end() :]
            if inside.startswith("Parser key"):
                return _explain(inside, key)
            return naming(key, f"class_path {found[1]}: {_plain(inside)}")
    plain = [_plain(bullet.splitlines()[0]) for bullet in bullets]
    if others := [reason for reason in plain if not reason.startswith("expected ")]:
        return naming(key, "; ".join(dict.fromkeys(others)))
    value = given.partition("Given value: ")[2].strip()
    types = " or ".join(reason.removeprefix("expected ") for reason in plain)
    return naming(key, f"expected {types}" + (f", not {value}" if len(value) <= MOST_SHOWN else ""))


def _bullets(text: str) -> list[str]:
    """The outermost bullets, each with all that is indented below it."""
    lines = text.splitlines()
    mark = lines[0][: lines[0].index("- ") + 2]
    bullets: list[str] = []
    for line in lines:
        if line.startswith(mark):
            bullets.append(line.removeprefix(mark))
        else:
            bullets[-1] += f"\n{line}"
    return bullets


def _plain(reason: str) -> str:
    """A reason on one line, in the words of a configuration file."""
    reason = " ".join(reason.split())
    for pattern, plain in WORDING:
        reason = re.sub(pattern, plain, reason)
    return reason
