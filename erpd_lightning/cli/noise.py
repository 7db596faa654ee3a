"""What libraries say that tells a user of the command line nothing."""

import logging
import warnings

USELESS_WARNINGS = (
    r"The `srun` command is available on your system but is not used",
    r"Total length of `\w+` across ranks is zero",
    r"The ``compute`` method of metric \w+ was called before the ``update`` method",  # A rank without prompts.
    r"The number of training batches .* is smaller than the logging interval",
)
"""Beginnings of warnings that tell a user of the command line nothing."""


def quieten_libraries() -> None:
    """Silence information, bars and warnings that nobody who runs a command can do anything about."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # Lightning asks torch in a way that torch 2.13 frowns at; nobody who runs a chain can do anything about it.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    # What they warn of is no mistake in a chain.
    for message in USELESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
