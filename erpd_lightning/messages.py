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
    (r"^Expected a dot import path string: (.*)", r"\1 is no class path"),
    (r"^Import path does not correspond to a subclass of", "expected a subclass of"),
    (r"^Problem with given class_path '(.*?)':", r"class_path \1:"),
    (r"^Expected an? ", "expected "),
    (r"\. Got value: (.*)", r", not \1"),
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
    found = re.match(r'Parser key "([^"]+)":\s*', text)
    message = _reasons(text[found.end() :] if found else text)
    return naming(found[1], message) if found else message


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
    return message if message.startswith(key) else f"{key}: {message}"


def _reasons(text: str) -> str:
    """What is wrong, out of a list with a bullet for each type that the value might have had."""
    head, found, listed = text.partition("Errors:\n")
    if not found:
        return _plain(" ".join(head.split()))
    listed, _, given = listed.partition("Given value type:")
    reasons = [_plain(bullet) for bullet in _bullets(listed)]
    in_class = [reason for reason in reasons if reason.startswith("class_path ")]
    if in_class:  # A class was named: that it is not of the other types tells nothing.
        return in_class[0]
    others = [reason for reason in reasons if not reason.startswith("expected ")]
    if others:
        return "; ".join(dict.fromkeys(others))
    value = given.partition("Given value: ")[2].strip()
    types = [reason.removeprefix("expected ") for reason in reasons]
    return f"expected {' or '.join(types)}" + (f", not {value}" if len(value) <= MOST_SHOWN else "")


def _bullets(text: str) -> list[str]:
    """The outermost bullets, each with its next line where it ends in a colon."""
    lines = text.splitlines()
    depth = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    bullets: list[str] = []
    for line in lines:
        if line.startswith(" " * depth + "- "):
            bullets.append(line.strip()[2:])
        elif bullets and bullets[-1].endswith(":"):
            bullets[-1] += f" {line.strip()}"
    return bullets


def _plain(reason: str) -> str:
    """A reason in the words of a configuration file."""
    for pattern, plain in WORDING:
        reason = re.sub(pattern, plain, reason)
    return reason
