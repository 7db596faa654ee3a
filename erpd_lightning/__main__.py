"""`python -m erpd_lightning`."""

import sys


def main() -> None:
    """The command line; the report has one of its own, which does not wait for torch."""
    if sys.argv[1:2] == ["report"]:
        from .report.command import main as report

        report(sys.argv[2:])
    else:
        from .processes import run_process

        run_process.begin()  # Before the imports, which take seconds.
        from .cli.main import main as cli

        cli()


if __name__ == "__main__":
    main()
