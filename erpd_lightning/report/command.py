"""Command `python -m erpd_lightning report`, which imports neither torch nor Lightning."""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from ..errors import UserError, refuse
from ..files import atomic_write
from ..text import visible
from .page import page
from .read import read_runs
from .tables import format_report


class _Parser(argparse.ArgumentParser):
    """Parser that reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write one HTML page on some runs, and print a short table.

    Args:
        runs: Run directories, finished or not.
        output: Path of the page; None for `report.html` in the first of them.

    Returns:
        Path of the page.

    Raises:
        UserError: If matplotlib is missing, a folder is no run, a file in it is damaged, or nothing can be written.
    """
    if find_spec("matplotlib") is None:
        raise UserError("the report needs matplotlib, which is not installed: pip install 'erpd-lightning[report]'")
    read = read_runs(runs)
    path = runs[0] / "report.html" if output is None else output
    if path.is_dir():
        raise UserError(f"--output {path} is a folder: the name of a file is expected")
    text = page(read)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, text)
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror}") from error
    print(format_report(read))
    print(f"The report lies in {visible(str(path))}")
    return path


def main(args: Sequence[str]) -> None:
    """Run the command; a mistake of the user's ends in a line and exit code 2."""
    parser = _Parser(
        prog="python -m erpd_lightning report",
        description="Write an HTML page on runs, finished or not: accuracy against KL, where KL went, and samples.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run directory; the first is the main one")
    parser.add_argument("--output", metavar="FILE", type=Path, help="default: report.html in the first run directory")
    try:
        given = parser.parse_args(args)
        write_report(given.runs, given.output)
    except UserError as error:
        refuse(str(error))
    except OSError as error:  # Of a folder or file that may not be read.
        refuse(f"{error.filename}: {error.strerror}")
