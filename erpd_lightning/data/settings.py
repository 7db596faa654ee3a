"""Settings of objects as JSON values: what rollouts are stored with, the same in every process."""

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence, Set
from contextvars import ContextVar
from enum import Enum
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np

from ..errors import UserError

DEEPEST = 10
LONGEST_INT = 4096
"""Bits of an integer: Python refuses to print those of more than 4,300 digits."""

_open: ContextVar[tuple[Any, ...]] = ContextVar("_open", default=())
"""Objects whose settings are being written, the outermost first: one that holds itself would be written for ever."""


def public_settings(obj: Any) -> dict[str, Any]:
    """The public attributes of an object as JSON values.

    Numbers, strings, lists and mappings are themselves, paths and patterns their text, classes and functions their
    names, other objects their class's name and their settings (a method `settings()` where they have one, their
    public attributes otherwise). Nothing is written as it happens to print: that may hold an address. Arrays, tensors
    and modules are refused: what is in them would have to be written down.

    Raises:
        UserError: If an attribute cannot be written so: the message names it.
    """
    held = _open.set((*_open.get(), obj))
    try:
        return _attributes(obj, type(obj).__name__, 0)
    finally:
        _open.reset(held)


def settings_of(obj: Any) -> list[Any]:
    """The class of a sampler or verifier and what its method `settings()` gives, as JSON values.

    Raises:
        UserError: If what it gives cannot be written so: the message names class and key.
    """
    name = type(obj).__qualname__
    return [name, _own(obj, name, 0)]


def _attributes(obj: Any, path: str, depth: int) -> dict[str, Any]:
    names = {**getattr(obj, "__dict__", {})}
    return {
        name: _value(value, f"{path}.{name}", depth + 1)
        for name, value in sorted(names.items())
        if not name.startswith("_")
    }


def _value(value: Any, path: str, depth: int) -> Any:
    """A value as JSON; `path` says where it stands."""
    if depth > DEEPEST:
        raise _unnamed(path, value, "it is nested too deeply, or holds itself")
    if isinstance(value, Enum):
        return [_name(type(value), path), value.name]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        if value.bit_length() > LONGEST_INT:
            raise _unnamed(path, value, f"it has {value.bit_length()} bits")
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if _is_any(value, "torch.dtype", "torch.device"):
        return str(value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, re.Pattern):
        return [_value(value.pattern, path, depth + 1), value.flags]
    if isinstance(value, Mapping):
        pairs = [[_value(key, path, depth + 1), _value(v, f"{path}[{key!r}]", depth + 1)] for key, v in value.items()]
        is_plain = all(isinstance(key, str) for key, _ in pairs)
        return dict(pairs) if is_plain else pairs
    if isinstance(value, Set):
        return sorted((_value(item, path, depth + 1) for item in value), key=lambda item: json.dumps(item))
    if isinstance(value, Sequence):
        return [_value(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
    return _object(value, path, depth)


def _object(value: Any, path: str, depth: int) -> Any:
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return _name(value, path)
    if isinstance(value, MethodType):
        return [_value(value.__self__, path, depth + 1), value.__name__]
    if isinstance(value, functools.partial):
        return [_value(part, path, depth + 1) for part in (value.func, value.args, value.keywords)]
    if not hasattr(value, "__dict__") or _is_any(value, "torch.Tensor", "torch.nn.modules.module.Module"):
        raise _unnamed(path, value, "what is in it cannot be written as JSON")
    return {"class": _name(type(value), path), **_own(value, path, depth)}


def _own(value: Any, path: str, depth: int) -> dict[str, Any]:
    """What an object says of itself by a method `settings()`; its public attributes where it has none."""
    if any(value is held for held in _open.get()):
        raise _unnamed(path, value, "it holds itself")
    named = getattr(value, "settings", None)
    held = _open.set((*_open.get(), value))
    try:
        if not isinstance(named, MethodType):
            return _attributes(value, path, depth)
        try:
            given = named()
        except RecursionError:
            raise _unnamed(path, value, "its method settings() calls itself without end") from None
        if not isinstance(given, Mapping):
            raise _unnamed(f"{path}.settings()", given, "it must be a mapping of names to JSON values")
        return {str(key): _value(v, f"{path}.settings()[{key!r}]", 1) for key, v in given.items()}
    finally:
        _open.reset(held)


def _is_any(value: Any, *classes: str) -> bool:
    """Whether a value is of one of torch's classes, without importing torch: processes that check answers do not."""
    return any(f"{base.__module__}.{base.__qualname__}" in classes for base in type(value).__mro__)


def _name(named: Any, path: str) -> str:
    """Module and name of a class or function."""
    name: str = named.__qualname__
    if "<lambda>" in name or (isinstance(named, FunctionType) and "<locals>" in name):
        raise _unnamed(path, named, "two such functions have the same name")
    return f"{named.__module__}.{name}"


def _unnamed(path: str, value: Any, why: str) -> UserError:
    return UserError(
        f"{path} is a {type(value).__name__}: {why}. Start its name with an underscore if nothing depends on it, or "
        f"give {path.split('.')[0]} a method settings() that names all that its results depend on"
    )
