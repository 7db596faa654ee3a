"""Lists whose items are made when they are asked for."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

Item = TypeVar("Item")


class Deferred(Sequence[Item], Generic[Item]):
    """A list whose items are made each time that they are asked for.

    Args:
        make: Makes an item from its key.
        keys: The key of each item.
    """

    def __init__(self, make: Callable[[Any], Item], keys: Sequence[Any]) -> None:
        self._make = make
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Item]:
        """The items; what goes wrong with one is not taken for the end of the list."""
        return map(self._make, self._keys)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> "Deferred[Item]": ...

    def __getitem__(self, index: int | slice) -> "Item | Deferred[Item]":
        if isinstance(index, slice):
            return Deferred(self._make, self._keys[index])
        return self._make(self._keys[index])
