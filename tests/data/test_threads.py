"""Calls in threads: their order, their exceptions, and how many run at a time."""

import threading
import time

import pytest

from erpd_lightning.data.threads import Pending, map_in_threads


def test_results_are_in_order_and_calls_beside_one_another() -> None:
    together = threading.Barrier(3, timeout=10)

    def call(number: int) -> int:
        together.wait()
        return number * number

    assert map_in_threads(call, range(6), threads=3) == [0, 1, 4, 9, 16, 25]
    assert map_in_threads(str, [], threads=3) == []


def test_the_first_exception_ends_it() -> None:
    called = []

    def call(number: int) -> None:
        called.append(number)
        if number == 1:
            raise KeyError(number)
        time.sleep(0.05)

    with pytest.raises(KeyError):
        map_in_threads(call, range(1000), threads=2)
    assert len(called) < 100


def test_a_pending_call() -> None:
    go = threading.Event()
    pending = Pending(lambda number: (go.wait(10), number)[1], 3)
    assert not pending.is_done
    go.set()
    assert pending.result() == 3
    assert pending.is_done
    with pytest.raises(ZeroDivisionError):
        Pending(lambda: 1 / 0).result()
