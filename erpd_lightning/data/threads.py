"""Threads that nobody waits for when the program ends: an interrupted run must not stay for what they wait for."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Pending(Generic[Result]):
    """A call that runs in a thread of its own."""

    def __init__(self, function: Callable[..., Result], *arguments: Any) -> None:
        self._result: list[Result] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function, arguments), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., Result], arguments: tuple[Any, ...]) -> None:
        try:
            self._result.append(function(*arguments))
        except BaseException as error:
            self._error = error

    @property
    def is_done(self) -> bool:
        """Whether the call has returned or raised."""
        return not self._thread.is_alive()

    def result(self) -> Result:
        """Wait for what the call returns; raises what it raises."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result[0]


def map_in_threads(function: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    """What a function gives for each item, in order; raises the first of its exceptions.

    Args:
        function: The function.
        items: Its arguments.
        threads: How many calls run beside one another at most.
    """
    results: dict[int, Result] = {}
    numbers = iter(range(len(items)))
    ended = threading.Event()
    lock = threading.Lock()

    def work() -> None:
        while not ended.is_set():
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                results[number] = function(items[number])
            except BaseException:
                ended.set()
                raise

    calls = [Pending(work) for _ in range(min(threads, len(items)))]
    try:
        for call in calls:
            call.result()
    finally:
        ended.set()
    return [results[number] for number in range(len(items))]
