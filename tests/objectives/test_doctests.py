"""The examples in the docstrings say what really comes out."""

import doctest
import inspect
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import pytest

import erpd_lightning.metrics
import erpd_lightning.objectives


def modules(package: ModuleType) -> list[str]:
    """Names of a package's modules and of the package itself."""
    return [package.__name__, *(info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))]


OBJECTIVES = modules(erpd_lightning.objectives)
METRICS = modules(erpd_lightning.metrics)


def public_functions(module: ModuleType) -> Iterator[str]:
    for name, value in vars(module).items():
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_"):
            yield name


@pytest.mark.parametrize("name", [*OBJECTIVES, *METRICS])
def test_examples_hold(name: str) -> None:
    module = import_module(name)
    found = doctest.testmod(module)
    assert found.failed == 0
    if name in OBJECTIVES and any(public_functions(module)):
        assert found.attempted > 0, f"{name} has public functions and no example"


def test_every_public_function_of_the_objectives_has_an_example() -> None:
    finder, without = doctest.DocTestFinder(recurse=False), []
    for name in OBJECTIVES:
        module = import_module(name)
        for function in public_functions(module):
            if not any(test.examples for test in finder.find(vars(module)[function], function, module)):
                without.append(f"{name}.{function}")
    assert len(OBJECTIVES) > 8
    assert without == []
