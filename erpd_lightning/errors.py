"""The exceptions for mistakes that the user can put right, and how a command line ends with them."""

import sys
from typing import NoReturn


class UserError(ValueError):
    """A mistake of the user's: the message names the key or file, what is wrong, and what would be right.

    The command line prints it without a traceback and exits with code 2.
    """


class InvalidArgument(UserError):
    """An argument of a class that has a value it cannot have.

    Classes know their arguments by their bare names; what builds them from a configuration knows the key that they
    stand under, and names it with `under`.

    Args:
        argument: Name of the argument, such as `kl_coef`.
        problem: The rest of the sentence, such as `is -1: it must be at least 0`.
    """

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(f"{argument} {problem}")
        self.argument = argument
        self.problem = problem

    def __reduce__(self) -> tuple[type["InvalidArgument"], tuple[str, str]]:
        return type(self), (self.argument, self.problem)

    def under(self, key: str) -> "InvalidArgument":
        """The same mistake with the key in front of the argument's name."""
        return InvalidArgument(f"{key}.{self.argument}", self.problem)


def check_at_least(least: int, **values: int | None) -> None:
    """Refuse numbers below the least that there may be; None stands for a number that is not given.

    Args:
        least: The least.
        **values: Numbers by the names of the arguments that they are.

    Raises:
        InvalidArgument: Names the first that is below it.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise InvalidArgument(name, f"is {value}: it must be at least {least}")


MAX_TOLD = 200
"""Characters of another library's error that are told: some explain themselves at length."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, not longer than can be read; its type where there is none."""
    return shortened(next(iter(str(error).strip().splitlines()), type(error).__name__))


def shortened(text: str) -> str:
    """The beginning of a text."""
    return text if len(text) <= MAX_TOLD else f"{text[:MAX_TOLD]}…"


def refuse(message: str) -> NoReturn:
    """End the program with a line about a mistake of the user's, and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
