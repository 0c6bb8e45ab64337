"""Prefetch: the batches of coming steps are read by one background thread while training computes.

A read is named by the sample number that it begins at, and each name follows from the one before (`following`). So the
state of a run stays (seed, consumed): `take(first)` gives what was read ahead for `first`, or discards all of it where
something else was read, as after a resume or a rollback. At most `ahead` reads are kept or being done.

An error of a read is raised by the `take` that wants it, not before. Where the thread has ended, as in a process forked
from this one, `take` raises instead of waiting for good.

Refused: a process instead of a thread. Reading is memory maps and numpy, which release the interpreter's lock for most
of their time, and a process would copy every batch once more and has to be watched, stopped and restarted.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import Generic, TypeVar

from fp8moe.errors import DataError

T = TypeVar("T")
_LOOK = 1.0  # seconds between looks at whether the thread still runs


class Prefetcher(Generic[T]):
    """Reads ahead in the order of training.

    read: what begins at a sample number; called in the thread, with `ahead` = 0 in the caller's.
    following: the sample number at which the next read begins.
    ahead: reads that are kept beside the one taken, at least 0.
    on_start: called once in the thread before its first read.
    """

    def __init__(
        self,
        read: Callable[[int], T],
        following: Callable[[int], int],
        *,
        ahead: int,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        assert ahead >= 0
        self._read, self._following, self._ahead, self._on_start = read, following, ahead, on_start
        self._reads: deque[tuple[int, Future[T]]] = deque()
        self._pool: ThreadPoolExecutor | None = None
        self._thread: threading.Thread | None = None

    def take(self, first: int) -> T:
        """What begins at sample `first`; the reads behind it are started. Raises what its read raised, or DataError."""
        if self._ahead == 0:
            return self._read(first)
        if self._reads and self._reads[0][0] != first:
            self.discard()
        self._start_reads(first)
        _, future = self._reads.popleft()
        try:
            return self._result(future)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Forget what was read ahead; a read that has begun ends unused."""
        for _, future in self._reads:
            future.cancel()
        self._reads.clear()

    def close(self) -> None:
        """End the thread, without waiting for a read that has begun."""
        self.discard()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = self._thread = None

    def _start_reads(self, first: int) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "data", initializer=self._begin)
        following = self._following(self._reads[-1][0]) if self._reads else first
        while len(self._reads) <= self._ahead:
            self._reads.append((following, self._pool.submit(self._read, following)))
            following = self._following(following)

    def _begin(self) -> None:
        self._thread = threading.current_thread()
        self._on_start()

    def _result(self, future: Future[T]) -> T:
        while True:
            try:
                return future.result(_LOOK)
            except NotYet:
                if future.done():  # the read itself raised it
                    raise
            if self._thread is not None and not self._thread.is_alive() and not future.done():
                raise DataError("the thread that reads data ahead has ended: use data.prefetch=0")
