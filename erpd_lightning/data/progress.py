"""How far sampling is: samplers tell of tokens and responses as they are drawn, and one listener hears of them.

A sampler's batch may take many minutes, in which nothing else happens. There is one listener in a process, as there is
one terminal; without any, what is told is forgotten.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[int, int], None]
"""Takes the numbers of tokens and of whole responses that were drawn since it was last told."""

_listeners: list[Listener] = []


def tell_drawn(tokens: int, responses: int = 0) -> None:
    """Tell the listener what was drawn; samplers call this often, from any thread."""
    if _listeners:
        _listeners[-1](tokens, responses)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell a listener of what is drawn in the block, in place of the one outside of it."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
