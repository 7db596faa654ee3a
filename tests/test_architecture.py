"""Imports run one way. Read from the sources with `ast`, so imports inside functions count too."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "erpd_lightning"
ROOT = Path(__file__).parents[1] / PACKAGE

# From the bottom up: a part imports from itself and from lower layers, not from its neighbours.
LAYERS: list[set[str]] = [
    {"objectives"},
    {"head", "seeds", "text"},
    {"metrics", "data"},
    {"policy", "line"},
    {"anchor", "evaluation"},
    {"policy_module"},
    {"extreme_region", "distill", "candidates", "sample_keeper"},
    {"callbacks", "records", "drawing", "messages"},
    {"report"},
    {"stages"},
    {"base_policy"},
    {"rounds", "config"},
    {"preview"},
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
    """Every module of the package by name; the link to callbacks/ is followed."""
    files = [*ROOT.glob("**/*.py"), *(ROOT / "callbacks").glob("**/*.py")]
    names = {}
    for path in files:
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


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("objectives.tilt", "import numpy as np"),
        ("objectives.tilt", "from ..errors import UserError"),
        ("objectives.tilt", "def f():\n    from ..head import Head"),
        ("objectives", "from .. import head"),
        ("head", "from . import metrics"),
        ("metrics", "import erpd_lightning.distill"),
        ("data.store", "from ..policy import load"),
        ("data.store", "from .. import UserError"),
        ("data.rollouts", "from ..metrics import PassAtK"),
        ("distill", "from .extreme_region import ExtremeRegionModule"),
        ("distill", "from .callbacks import Throughput"),
        ("distill", "class A:\n    def f(self):\n        import erpd_lightning.callbacks.samples"),
        ("policy_module", "from erpd_lightning import rounds"),
        ("callbacks.throughput", "from ..rounds import run"),
        ("callbacks", "from ..cli import main"),
        ("rounds", "if True:\n    from .cli import main"),
        ("data.tilted", "from ..policy import load_policy"),
        ("candidates", "from .preview import PreviewTrainer"),
        ("preview", "from .cli import main"),
        ("errors", "from .head import Head"),
    ],
)
def test_the_checker_finds(module: str, source: str) -> None:
    name = f"{PACKAGE}.{module}"
    assert len(violations(source, name, module in {"objectives", "callbacks"})) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("objectives.tilt", "import math\nimport torch.nn.functional as F\nfrom torch import nn"),
        ("objectives.tilt", "from .reduction import masked_sum"),
        ("objectives", "from .tilt import tilt"),
        ("head", "from .objectives.tilt import LOG_ZERO"),
        ("data.store", "import pyarrow\nfrom ..errors import UserError\nfrom .batching import a"),
        ("distill", "from .policy_module import PolicyModule\nfrom . import head, metrics"),
        ("callbacks.throughput", "from ..data.batching import RolloutBatch"),
        ("callbacks", "from .throughput import Throughput"),
        ("cli", "from .rounds import run\nfrom . import callbacks"),
        ("__main__", "from .cli import main"),
    ],
)
def test_the_checker_accepts(module: str, source: str) -> None:
    name = f"{PACKAGE}.{module}"
    assert violations(source, name, module in {"objectives", "callbacks"}) == []
