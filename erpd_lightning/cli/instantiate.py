"""From an option's value to instances of the classes that are configured in it."""

from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from ..errors import InvalidArgument, UserError, shortened
from .dependencies import class_of
from .errors import one_line, rejected_value, with_key

CONSTRUCTION_ERRORS = (MisconfigurationException, ValueError, TypeError, ImportError)
"""What a class raises that does not like its arguments."""


def instantiate(parser: LightningArgumentParser, key: str, value: Any, name: str | None = None) -> Any:
    """The value of an option with its classes instantiated.

    Args:
        parser: The parser that the option is one of.
        key: The option.
        value: Its value as it was parsed.
        name: The key that the value was given under, if it is another one.

    Raises:
        UserError: If a class does not like its arguments; names the key that they were given under.
    """
    if not isinstance(value, Namespace | list | dict):
        return value
    name = name or key
    failed: list[tuple[type, dict[str, Any], Exception]] = []

    def make(kind: type, /, *args: Any, **kwargs: Any) -> Any:
        try:
            return kind(*args, **kwargs)
        except CONSTRUCTION_ERRORS as error:
            failed.append((kind, kwargs, error))
            raise

    try:
        # jsonargparse folds an error of a class into a text: who made the class has the error itself.
        made = parser.instantiate(Namespace({key: value}), instantiators=[(make, object, True)])
    except CONSTRUCTION_ERRORS as error:
        if not failed:
            raise UserError(with_key(*rejected_value(str(error), name))) from error
        kind, kwargs, cause = failed[0]
        where = name + _path_to(kind, kwargs, value)
        if isinstance(cause, InvalidArgument):
            raise cause.under(where) from error
        if isinstance(cause, UserError):  # It says itself what it is about.
            raise cause from error
        raise UserError(f"{where}: {shortened(one_line(cause))}") from error
    return made[key]


def _path_to(kind: type, kwargs: Mapping[str, Any], value: Any) -> str:
    """Where below an option the class is configured that was made so, as it stands after the option's key."""
    found = [(path, arguments) for path, made, arguments in _classes(value) if made is kind]
    alike = [
        path
        for path, arguments in found
        if all(kwargs.get(name) == each for name, each in arguments.items() if not isinstance(each, Namespace | list))
    ]
    return next(iter([*alike, *(path for path, _ in found)]), "")


def _classes(value: Any, path: str = "") -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Classes that are configured in a value: the path to each, what it is, and its arguments."""
    if isinstance(value, list):
        for each in value:
            name = each["class_path"].rpartition(".")[2] if isinstance(each, Namespace) and "class_path" in each else ""
            yield from _classes(each, f"{path}: {name}" if name else path)
    elif isinstance(value, Namespace):
        inner = vars(value)
        if "class_path" in value:
            inner = vars(value.get("init_args") or Namespace())
            yield path, class_of(value["class_path"]), inner
        for name, each in inner.items():
            yield from _classes(each, f"{path}.{name}")
