"""What the processes of `PythonFunction` run: the user's function is imported, and called with what it asks for."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np

RESPONSES = ("responses", "completions")
ANSWERS = ("answers", "answer")
WITH_KWARGS = ("completions", "answer", "prompts")
"""What TRL's reward functions find in their keyword arguments."""

Call = Callable[[Sequence[str], Sequence[str], Sequence[str]], dict[str, Any]]


def load(path: str) -> Call:
    """A function of prompts, responses and answers that calls the user's, and gives `{"rewards": …}`.

    Where the user's function raises it gives `{"error": …}`, where it gives something else `{"problem": …}`: a line.

    Args:
        path: Import path of the user's function.

    Raises:
        Exception: If it cannot be imported, or its parameters are others.
    """
    module, _, name = path.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    choose = _chooser(function, path)

    def call(prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
        values = {"prompts": prompts}
        values |= dict.fromkeys(RESPONSES, responses) | dict.fromkeys(ANSWERS, answers)
        try:
            given = choose(values)
        except Exception as error:
            return {"error": " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")[:300]}
        return _rewards(given, len(responses))

    return call


def _chooser(function: Any, path: str) -> Callable[[dict[str, Any]], Any]:
    """Calls the function with what it asks for, of values by name."""
    if not callable(function):
        raise TypeError(f"{path} is a {type(function).__name__}, not a function")
    parameters = inspect.signature(function).parameters.values()
    kinds = inspect.Parameter
    named = [p.name for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    variable = (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    required = [p.name for p in parameters if p.default is kinds.empty and p.kind not in variable]
    takes_any = any(p.kind == kinds.VAR_KEYWORD for p in parameters)
    known = {"prompts", *RESPONSES, *ANSWERS}
    if set(required) <= known and (takes_any or set(RESPONSES) & set(named)):
        asked = {*(WITH_KWARGS if takes_any else ()), *(name for name in named if name in known)}
        return lambda values: function(**{name: values[name] for name in asked})
    if len(required) == 2 and not set(required) & known:
        return lambda values: function(values["responses"], values["answers"])
    raise TypeError(
        f"{path}{inspect.signature(function)} asks for other parameters than responses (or completions), answers (or "
        "answer) and prompts"
    )


def _rewards(given: Any, count: int) -> dict[str, Any]:
    if isinstance(given, np.ndarray):
        given = given.tolist()
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        return {"problem": f"a {type(given).__name__}: it must give a list of a number or None for each response"}
    if len(given) != count:
        return {"problem": f"{len(given)} rewards for {count} responses: it must give one for each"}
    for value in given:
        if value is not None and not isinstance(value, Real | np.bool_):
            return {"problem": f"a {type(value).__name__} as a reward: it must be a finite number or None"}
    return {"rewards": [None if value is None else float(value) for value in given]}
