"""Imports run one way. Read from the sources with `ast`, so imports inside functions count too."""

import ast
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = "erpd_lightning"
ROOT = Path(__file__).parents[1] / PACKAGE

# From the bottom up: a part imports from itself and from lower layers, not from its neighbours.
LAYERS: list[set[str]] = [
    {"objectives"},
    {"files", "processes", "seeds", "text"},
    {"models"},
    {"metrics", "data"},
    {"budget"},
    {"modules"},
    {"callbacks"},
    {"report"},
    {"pipeline"},
    {"cli"},
    {"__main__"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
EVERYWHERE = {"errors"}  # imports nothing of the package; objectives/ may not import it either
PUBLIC_NAMES = "__init__"  # of the package: points lazily at parts of any layer


def part_of(module: str) -> str:
    """`erpd_lightning.data.store` belongs to `data`, `erpd_lightning` itself to `__init__`."""
    return [*module.split("."), PUBLIC_NAMES][1]


def imported_modules(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that is imported anywhere in the source.

    `from a import b` counts as `a.b`, since `b` may be a module.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            path = [*base, *(node.module.split(".") if node.module else [])]
            yield from ((node.lineno, ".".join([*path, alias.name])) for alias in node.names)


def is_allowed(importer: str, imported: str) -> bool:
    part, top = part_of(importer), imported.split(".")[0]
    if part == PUBLIC_NAMES:
        return True
    if top != PACKAGE:
        return part != "objectives" or top == "torch" or top in sys.stdlib_module_names
    target = part_of(imported)
    if part == target:
        return True
    if part in EVERYWHERE or target not in LEVEL:
        return target in EVERYWHERE and part not in {*EVERYWHERE, "objectives"}
    return LEVEL[target] < LEVEL[part]


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """One line for each import that points the wrong way."""
    return [
        f"{module}:{line} imports {imported}"
        for line, imported in imported_modules(source, module, is_package)
        if not is_allowed(module, imported)
    ]


def modules() -> dict[str, Path]:
    """Every module of the package by name."""
    names = {}
    for path in ROOT.glob("**/*.py"):
        relative = path.relative_to(ROOT.parent).with_suffix("")
        parts = relative.parts[:-1] if relative.name == "__init__" else relative.parts
        names[".".join(parts)] = path
    return names


def test_every_module_has_a_layer() -> None:
    names = modules()
    assert {f"{PACKAGE}.callbacks", f"{PACKAGE}.data", f"{PACKAGE}.objectives"} <= set(names)
    parts = {part_of(name) for name in names}
    assert parts <= {*LEVEL, *EVERYWHERE, PUBLIC_NAMES}


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_run_one_way(module: str) -> None:
    path = modules()[module]
    assert violations(path.read_text("utf-8"), module, path.name == "__init__.py") == []


def circle(graph: Mapping[str, Collection[str]]) -> list[str]:
    """Some circle of a graph, its first node again at the end; empty if there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            if found := visit(target, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def test_no_import_goes_in_a_circle() -> None:
    names = modules()
    graph: dict[str, set[str]] = {}
    for module, path in names.items():
        if module == PACKAGE:  # Its names are imported lazily.
            continue
        for _, imported in imported_modules(path.read_text("utf-8"), module, path.name == "__init__.py"):
            # `from a import b` is an import of a.b if that is a module, and of a otherwise.
            target = imported if imported in names else imported.rpartition(".")[0]
            if target in names and target not in (module, PACKAGE):
                graph.setdefault(module, set()).add(target)
    assert len(graph) > 40
    assert circle(graph) == []


def test_the_checker_finds_a_circle() -> None:
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("objectives.tilted_policy", "import numpy as np"),
        ("objectives.tilted_policy", "from ..errors import UserError"),
        ("objectives.tilted_policy", "def f():\n    from ..models.head import Head"),
        ("objectives", "from .. import models"),
        ("models.head", "from .. import metrics"),
        ("models.policy", "from ..data.batching import RolloutBatch"),
        ("metrics.tokens", "import erpd_lightning.modules.distill"),
        ("data.store", "from ..budget.controller import BudgetController"),
        ("data.store", "from .. import UserError"),
        ("data.rollouts", "from ..metrics import PassAtK"),
        ("budget.controller", "from ..modules.distill import DistillModule"),
        ("modules.distill", "from ..callbacks import Throughput"),
        ("modules.distill", "class A:\n    def f(self):\n        import erpd_lightning.callbacks.samples"),
        ("modules.policy_module", "from erpd_lightning import pipeline"),
        ("callbacks.throughput", "from ..pipeline.rounds import Rounds"),
        ("callbacks", "from ..cli.main import main"),
        ("report.read", "from ..pipeline.records import read_record"),
        ("pipeline.rounds", "if True:\n    from ..cli.main import main"),
        ("cli.config", "from ..__main__ import main"),
        ("errors", "from .models.head import Head"),
    ],
)
def test_the_checker_finds(module: str, source: str) -> None:
    name = f"{PACKAGE}.{module}"
    assert len(violations(source, name, module in {"objectives", "callbacks"})) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("objectives.tilted_policy", "import math\nimport torch.nn.functional as F\nfrom torch import nn"),
        ("objectives.tilted_policy", "from .reduction import masked_sum"),
        ("objectives", "from .tilted_policy import tilt"),
        ("models.head", "from ..objectives.tilted_policy import LOG_ZERO"),
        ("data.store", "import pyarrow\nfrom ..errors import UserError\nfrom .batching import a"),
        ("modules.distill", "from .policy_module import PolicyModule\nfrom .. import models, metrics"),
        ("callbacks.throughput", "from ..data.batching import RolloutBatch"),
        ("callbacks", "from .throughput import Throughput"),
        ("cli.main", "from ..pipeline.rounds import Rounds\nfrom .. import callbacks"),
        ("__main__", "from .cli.main import main"),
    ],
)
def test_the_checker_accepts(module: str, source: str) -> None:
    name = f"{PACKAGE}.{module}"
    assert violations(source, name, module in {"objectives", "callbacks"}) == []
