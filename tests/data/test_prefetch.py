"""`Prefetcher`: the order, what is discarded, errors in their place, a bounded number of reads, no wait for good."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest

from fp8moe.data import prefetch
from fp8moe.data.prefetch import Prefetcher
from fp8moe.errors import DataError


class Reads:
    """Reads of 10 samples each, noted as they begin."""

    def __init__(self, what: Callable[[int], object] = lambda first: first) -> None:
        self.begun: list[tuple[int, str]] = []
        self.what = what

    def __call__(self, first: int) -> object:
        self.begun.append((first, threading.current_thread().name))
        return self.what(first)

    def firsts(self) -> list[int]:
        return [first for first, _ in self.begun]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def following(first: int) -> int:
    return first + 10


def test_reads_are_those_of_the_order_and_no_more_than_asked_for_are_ahead() -> None:
    reads = Reads()
    reader = Prefetcher(reads, following, ahead=3)
    for step in range(20):
        assert reader.take(step * 10) == step * 10
        until(lambda step=step: len(reads.begun) == step + 4)  # type: ignore[misc]
    time.sleep(0.05)
    assert reads.firsts() == [i * 10 for i in range(23)]
    assert all(name.startswith("data") for _, name in reads.begun)
    reader.close()


def test_nothing_ahead_reads_in_the_caller() -> None:
    reads = Reads()
    reader = Prefetcher(reads, following, ahead=0)
    assert [reader.take(first) for first in (0, 10, 70)] == [0, 10, 70]
    assert {name for _, name in reads.begun} == {threading.current_thread().name}


def test_training_computes_while_the_thread_reads() -> None:
    second = threading.Event()
    reads = Reads(lambda first: second.set() if first == 10 else None)
    reader = Prefetcher(reads, following, ahead=1)
    reader.take(0)
    assert second.wait(20), "the second read waits for no take"
    reader.close()


def test_what_was_read_for_another_place_is_discarded() -> None:
    reads = Reads()
    reader = Prefetcher(reads, following, ahead=2)
    assert [reader.take(0), reader.take(500), reader.take(510), reader.take(10)] == [0, 500, 510, 10]
    assert reader.take(20) == 20
    reader.close()
    assert reader.take(30) == 30, "a closed reader begins anew"
    reader.close()


def test_an_error_comes_where_its_read_is_wanted_and_the_next_take_reads_again() -> None:
    failing = [20]

    def read(first: int) -> int:
        if first in failing:
            raise DataError(f"sample {first} is broken")
        return first

    reads = Reads(read)
    reader = Prefetcher(reads, following, ahead=2)
    assert reader.take(0) == 0
    until(lambda: 20 in reads.firsts())
    assert reader.take(10) == 10
    with pytest.raises(DataError, match="sample 20 is broken"):
        reader.take(20)
    failing.clear()
    assert reader.take(20) == 20
    reader.close()


def test_a_timeout_of_the_read_itself_is_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "_LOOK", 0.01)

    def slow(first: int) -> int:
        time.sleep(0.1)
        raise TimeoutError("the file server")

    reader = Prefetcher(Reads(slow), following, ahead=1)
    with pytest.raises(TimeoutError, match="the file server"):
        reader.take(0)
    reader.close()


def test_a_read_that_ends_its_thread_is_an_error() -> None:
    def leave(first: int) -> None:
        raise SystemExit(3)

    reader = Prefetcher(Reads(leave), following, ahead=1)
    with pytest.raises(SystemExit):
        reader.take(0)
    reader.close()


def test_a_thread_that_is_no_more_is_an_error_and_not_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked process has no thread of its parent."""
    monkeypatch.setattr(prefetch, "_LOOK", 0.05)
    hold = threading.Event()
    reader = Prefetcher(Reads(lambda first: first == 0 or hold.wait(60)), following, ahead=1)
    reader.take(0)
    child = os.fork()
    if child == 0:
        try:
            reader.take(10)
        except DataError as error:
            os._exit(7 if "has ended: use data.prefetch=0" in str(error) else 8)
        os._exit(9)
    deadline = time.monotonic() + 30
    while (status := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if status[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child waits")
    hold.set()
    reader.close()
    assert os.waitstatus_to_exitcode(status[1]) == 7


def test_the_thread_ends_with_its_reader() -> None:
    began = threading.Event()
    reader = Prefetcher(Reads(), following, ahead=1, on_start=began.set)
    reader.take(0)
    assert began.is_set()
    thread = reader._thread
    assert thread is not None
    reader.close()
    thread.join(20)
    assert not thread.is_alive()
