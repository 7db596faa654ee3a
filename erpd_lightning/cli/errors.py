"""A mistake in a configuration as one line that names the key, what is wrong with it, and what would be right."""

import re
from collections.abc import Collection
from difflib import get_close_matches

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

MAX_VALUE_LENGTH = 60
"""Characters of a value that is repeated to the user."""


def one_line(error: object) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())


def unknown_option(key: str, options: Collection[str], bound: Collection[str] = ()) -> str:
    """A line about an option that does not exist, with the one that was probably meant.

    Args:
        key: What was given.
        options: All options there are.
        bound: Keys that are no options because the program fills them in.
    """
    if key in bound:
        return f"{key} is no option: the chain of stages sets it"
    leaf = key.rpartition(".")[2]
    guesses = [option for option in sorted(options) if option.rpartition(".")[2] == leaf]
    guesses = guesses or get_close_matches(key, sorted(options), n=1, cutoff=0.75)
    hint = f"did you mean {' or '.join(guesses)}?" if guesses else "--help lists all that there are"
    return f"{key} is no option: {hint}"


def rejected_value(text: str, key: str = "") -> tuple[str, str]:
    """The key whose value jsonargparse rejects, empty if it names none, and why, on one line.

    Its errors hold a text and nothing else: neither the key nor the type that was expected, and of a union's several
    reasons only the first is the error's cause. So this reads the text, whose reasons nest as classes and their
    arguments do. A text of another form is told as it is.

    Args:
        text: What jsonargparse says.
        key: The key that it says it about.
    """
    if found := re.match(r'\s*Parser key "([^"]+)":\s*', text):
        return rejected_value(text[found.end() :], f"{key}.{found[1]}" if key else found[1])
    _, _, reasons = text.partition("Errors:\n")
    bullet = re.match(r"\s*- ", reasons)
    if bullet is None:
        return key, _in_plain_words(text)
    reasons, _, given = reasons.rpartition("Given value type:")
    bullets = re.split(f"^{bullet[0]}", reasons, flags=re.MULTILINE)[1:]
    for reason in bullets:  # A class was named: that the value is of no other type tells nothing.
        if found := re.match(r"Problem with given class_path '(.*?)':\s*", reason):
            inside = reason[found.end() :]
            if inside.startswith("Parser key"):
                return rejected_value(inside, key)
            return key, f"class_path {found[1]}: {_in_plain_words(inside)}"
    plain = [_in_plain_words(reason.splitlines()[0]) for reason in bullets]
    if others := [reason for reason in plain if not reason.startswith("expected ")]:
        return key, "; ".join(dict.fromkeys(others))
    value = given.partition("Given value: ")[2].strip()
    types = " or ".join(reason.removeprefix("expected ") for reason in plain)
    return key, f"expected {types}" + (f", not {value}" if len(value) <= MAX_VALUE_LENGTH else "")


def _in_plain_words(reason: str) -> str:
    reason = one_line(reason)
    for pattern, plain in WORDING:
        reason = re.sub(pattern, plain, reason)
    return reason


def with_key(key: str, problem: str) -> str:
    """A problem with its key in front, if there is one."""
    return f"{key}: {problem}" if key else problem
