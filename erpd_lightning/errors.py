"""The one exception for mistakes that the user can put right."""


class UserError(ValueError):
    """A mistake of the user's: the message names the key or file, what is wrong, and what would be right.

    The command line prints it without a traceback and exits with code 2.
    """
