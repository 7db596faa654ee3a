"""The one exception for mistakes that the user can put right, and how a command line ends with it."""

import sys
from typing import NoReturn


class UserError(ValueError):
    """A mistake of the user's: the message names the key or file, what is wrong, and what would be right.

    The command line prints it without a traceback and exits with code 2.
    """


def first_line(error: Exception) -> str:
    """The first line of an error's message; its type where there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def refuse(message: str) -> NoReturn:
    """End the program with a line about a mistake of the user's, and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
