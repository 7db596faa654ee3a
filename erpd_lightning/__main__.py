"""`python -m erpd_lightning`."""

import sys


def main() -> None:
    """The command line; report, rollouts and push have ones of their own, and a report does not wait for torch."""
    if sys.argv[1:2] == ["report"]:
        from .report.command import main as report

        report(sys.argv[2:])
    elif sys.argv[1:2] == ["rollouts"]:
        from .cli.rollouts import main as rollouts

        rollouts(sys.argv[2:])
    elif sys.argv[1:2] == ["push"]:
        from .cli.push import main as push

        push(sys.argv[2:])
    else:
        from .processes import run_process

        run_process.begin()  # Before the imports, which take seconds.
        from .cli.main import main as cli

        cli()


if __name__ == "__main__":
    main()
