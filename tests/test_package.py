"""Names, installation and the one callback that comes with the package."""

import ast
import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import erpd_lightning
from erpd_lightning.callbacks import Throughput
from support.trainers import make_trainer

ROOT = Path(__file__).parents[1]


def python(code: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs code that sees the given folder before all installed packages, and no other checkout."""
    prefix = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    return subprocess.run([sys.executable, "-I", "-c", prefix + code], cwd=cwd, capture_output=True, text=True)


# Lazy names


def test_importing_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    code = """
import erpd_lightning
erpd_lightning.UserError, erpd_lightning.__version__, dir(erpd_lightning)
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "lightning", "numpy"}))
"""
    result = python(code, tmp_path, ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[]\n"


@pytest.mark.parametrize("name", erpd_lightning.__all__)
def test_public_name_resolves(name: str) -> None:
    value = getattr(erpd_lightning, name)
    assert name == "__version__" or value.__name__ == name
    assert name in dir(erpd_lightning)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = erpd_lightning.Nonsense


def test_type_checkers_see_the_names_that_exist_at_run_time() -> None:
    tree = ast.parse((ROOT / "erpd_lightning" / "__init__.py").read_text("utf-8"))
    declared = {
        alias.name: f".{node.module}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert declared == erpd_lightning._HOMES
    assert {*declared, "__version__"} == set(erpd_lightning.__all__)


# One package under one name


def test_callbacks_has_no_second_name() -> None:
    result = python("import callbacks", ROOT, ROOT)
    assert result.returncode == 1
    assert "ImportError: attempted relative import beyond top-level package" in result.stderr


def test_callbacks_is_a_relative_link() -> None:
    link = ROOT / "callbacks"
    assert link.is_symlink()
    assert os.readlink(link) == os.path.join("erpd_lightning", "callbacks")


def test_this_environment_imports_this_checkout() -> None:
    module = importlib.import_module("erpd_lightning.callbacks.throughput")
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == ROOT / "erpd_lightning" / "callbacks" / "throughput.py"


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheel and sdist, built from a copy: the checkout gets no build folder."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("erpd_lightning", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "MANIFEST.in", "Makefile"):
        shutil.copy(ROOT / name, source)
    options = ["--sdist", "--wheel", "--no-isolation", "--outdir", str(output)]
    command = [sys.executable, "-m", "build", *options, str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return output


@pytest.fixture(scope="module")
def wheel(archives: Path) -> zipfile.ZipFile:
    (path,) = archives.glob("*.whl")
    assert path.name == f"erpd_lightning-{erpd_lightning.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(path)


def test_wheel_holds_every_module_once(wheel: zipfile.ZipFile) -> None:
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    modules = {path.relative_to(ROOT) for path in ROOT.glob("erpd_lightning/**/*.py")}
    assert sorted(names) == sorted([*map(Path.as_posix, modules), "erpd_lightning/py.typed"])


def test_sdist_holds_the_configurations(archives: Path) -> None:
    (path,) = archives.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    configs = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/**/*.yaml")}
    assert {*configs, "Makefile", "erpd_lightning/callbacks/throughput.py"} <= names


def test_callbacks_are_imported_from_the_wheel(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = """
import erpd_lightning.callbacks
print(erpd_lightning.callbacks.Throughput.__module__, erpd_lightning.callbacks.__file__)
"""
    result = python(code, tmp_path, tmp_path)
    assert result.returncode == 0, result.stderr
    module, file = result.stdout.split()
    assert module == "erpd_lightning.callbacks.throughput"
    assert Path(file) == tmp_path / "erpd_lightning" / "callbacks" / "__init__.py"


# Throughput


class Constant(LightningModule):
    """Four micro-batches an epoch in two steps of seven tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.weight * 1.0

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        batches = [SimpleNamespace(last=last, step_tokens=7) for last in (False, True) * 2]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    val_dataloader = train_dataloader


def fit(folder: Path, *callbacks: Callback, epochs: int, resume: Path | None = None) -> Trainer:
    trainer = make_trainer(*callbacks, default_root_dir=folder, max_epochs=epochs, num_sanity_val_steps=2)
    trainer.fit(Constant(), ckpt_path=resume)
    return trainer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replaces the callback's clock by one that only the test moves."""
    now = [1000.0]
    monkeypatch.setattr("erpd_lightning.callbacks.throughput.perf_counter", lambda: now[0])
    return now


class Passing(Callback):
    """Lets 0.5 s pass in each training batch and 100 s in each validation."""

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock

    def on_train_batch_start(self, *_: Any) -> None:
        self.clock[0] += 0.5

    def on_validation_start(self, *_: Any) -> None:
        self.clock[0] += 100


def test_throughput_counts_steps_and_training_time(tmp_path: Path, clock: list[float]) -> None:
    trainer = fit(tmp_path, Throughput(), Passing(clock), epochs=2)
    assert trainer.callback_metrics["throughput/tokens_per_second"].item() == 28 / 4


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint:UserWarning")
@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")
def test_throughput_goes_on_after_an_interruption(tmp_path: Path, clock: list[float]) -> None:
    def callbacks() -> list[Callback]:
        checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
        return [Throughput(), Passing(clock), checkpoint]

    fit(tmp_path, *callbacks(), epochs=1)
    clock[0] += 5000
    throughput, *others = callbacks()
    resume = tmp_path / "step=2.ckpt"  # the middle of the epoch
    trainer = fit(tmp_path, throughput, *others, epochs=1, resume=resume)
    assert throughput.state_dict() == {"tokens": 14, "seconds": 2.0}
    assert trainer.callback_metrics["throughput/tokens_per_second"].item() == 14 / 2


def test_throughput_of_nothing_is_not_logged() -> None:
    module = SimpleNamespace(log=None)  # calling it would fail
    Throughput().on_train_epoch_end(SimpleNamespace(), module)  # type: ignore[arg-type]
