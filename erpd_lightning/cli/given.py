"""What was given on the command line and in configuration files, before and apart from its parsing.

jsonargparse tells of an unknown key or an unreadable file in a text alone. Both are found here by looking.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from ..errors import UserError
from .errors import one_line

NOT_SETTINGS = {"config", "help", "print_config"}
"""Options of every parser that set nothing themselves."""


NOT_EMPTY = "run_dir"
"""An option whose empty value is a mistake that parsing hides."""


def check_files(args: Sequence[str], keys: Collection[str]) -> None:
    """Read the configuration files among the arguments, and the mappings that are given as they are.

    Args:
        args: Arguments of the command line.
        keys: Options that take a configuration file besides `config`.

    Raises:
        UserError: Names the file that holds no options, or a key that is given twice or, where it must not, empty.
    """
    for name, value in _options(args):
        settings = {name: value}
        if name == "config" or name in keys or value.startswith("{"):
            settings = {**settings, **_read(value)}
        given = settings.get(NOT_EMPTY)
        if isinstance(given, str) and not given.strip():  # Parsed, it would be the current directory.
            raise UserError(f"{NOT_EMPTY} is empty: a directory for all that a run makes is expected")


def unknown_keys(args: Sequence[str], options: Collection[str]) -> Iterator[str]:
    """Keys among the arguments, and in the files that they name, that are no option, in their order.

    Args:
        args: Arguments of the command line.
        options: All options there are, by their dotted names.
    """
    for name, value in _options(args):
        if name == "config":
            yield from unknown_settings(_read(value), options)
        elif name not in NOT_SETTINGS:
            yield from unknown_settings({name: _read(value) if _is_group(name, options) else value}, options)


def unknown_settings(settings: Mapping[Any, Any], options: Collection[str], prefix: str = "") -> Iterator[str]:
    """Dotted keys of nested settings that are no option.

    What lies below an option is part of its value: whether its class takes it is not looked at.
    """
    for name, value in settings.items():
        key = f"{prefix}{name}"
        parents = [key[:end] for end in (*(i for i, letter in enumerate(key) if letter == "."), len(key))]
        if any(parent in options for parent in parents):
            continue
        if isinstance(value, Mapping) and value:
            yield from unknown_settings(value, options, f"{key}.")
        elif not _is_group(key, options):
            yield key


def _is_group(key: str, options: Collection[str]) -> bool:
    return any(option.startswith(f"{key}.") for option in options)


def _options(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and values of the options among the arguments; the value is empty where none follows."""
    for arg, following in zip_longest(args, args[1:], fillvalue="--"):
        if arg.startswith("--") and arg != "--":
            name, equals, value = arg.removeprefix("--").partition("=")
            yield name.removesuffix("+"), value if equals or following.startswith("--") else following


def _repeated_keys(node: Any, prefix: str = "", seen: set[str] | None = None) -> Iterator[Any]:
    """The nodes of keys that a mapping in YAML has already, nested or dotted: parsers keep the last of them in silence.

    Args:
        node: A node of YAML.
        prefix: The dotted name of the mapping that it is the value of, with a dot behind it.
        seen: Dotted names of the keys before it; a mapping in a list has names of its own.
    """
    seen = set() if seen is None else seen
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if isinstance(key, yaml.ScalarNode) and name in seen:
                yield key
            seen.add(name)
            yield from _repeated_keys(value, f"{name}.", seen)
    elif isinstance(node, yaml.SequenceNode):
        for each in node.value:
            yield from _repeated_keys(each)


def _read(value: str) -> dict[Any, Any]:
    """The settings in a configuration file, or in a value that is none; empty where a value is something else.

    Raises:
        UserError: If there is a file that holds no settings.
    """
    try:
        path = Path(value) if Path(value).is_file() else None
    except OSError:  # Too long to be the name of a file.
        path = None
    try:
        text = value if path is None else path.read_text()
        settings = get_loader("yaml")(text)
        repeated = next(_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader)), None)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        if path is None:
            return {}
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f"line {mark.line + 1}: "
        problem = getattr(error, "problem", None) or one_line(error)
        raise UserError(f"{path} cannot be read as options: {where}{problem}") from error
    if isinstance(settings, dict):
        if repeated is not None:
            where = "" if path is None else f"{path}, line {repeated.start_mark.line + 1}: "
            raise UserError(f"{where}{repeated.value} is given twice in the same place: leave one of them out")
        return settings
    if path is None:
        return {}
    held = "nothing" if settings is None else f"a {type(settings).__name__}"
    raise UserError(f"{path} cannot be read as options: it holds {held}, where keys and their values are expected")
