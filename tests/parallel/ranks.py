"""Real processes over gloo for a test: forked from this warm one, joined in bounded time.

Importing torch takes seconds a process, forking milliseconds. A rank that fails or hangs fails the test, with its
traceback, and none outlives it.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=60)
BEFORE: list[Callable[[tuple[Any, ...]], None]] = []  # called with the ranks' arguments: what is prepared is forked too


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 90.0, absent: tuple[int, ...] = ()
) -> list[Any]:
    """`function(*args)` on every rank of a gloo world -> the results in order of rank (pickled, so no graphs).

    Ranks `absent` are not waited for: they hang or die, and their result is None.
    """
    with started(function, world_size, *args, timeout=timeout, absent=absent) as results:
        return results()


@contextlib.contextmanager
def started(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 90.0, absent: tuple[int, ...] = ()
) -> Iterator[Callable[[], list[Any]]]:
    """The same without waiting: what is yielded gives the results, and no rank outlives the block."""
    for prepare in BEFORE:
        prepare(args)
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            context.Process(target=_rank, args=(function, args, rank, world_size, folder, pipes[rank][1]), daemon=True)
            for rank in range(world_size)
        ]
        deadline = time.monotonic() + timeout
        try:
            for process, (_, writer) in zip(ranks, pipes, strict=True):
                process.start()
                writer.close()
            yield lambda: _collect([reader for reader, _ in pipes], deadline, absent)
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _collect(readers: list[Connection], deadline: float, absent: tuple[int, ...]) -> list[Any]:
    results: dict[int, Any] = dict.fromkeys(absent)
    while len(results) < len(readers):
        pending = [r for i, r in enumerate(readers) if i not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {[i for i in range(len(readers)) if i not in results]} did not answer in time"
        for reader in ready:
            rank = readers.index(reader)  # type: ignore[arg-type]
            try:
                ok, value = pickle.loads(readers[rank].recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died without a result") from None
            assert ok, f"rank {rank} failed:\n{value}"
            results[rank] = value
    return [results[i] for i in range(len(readers))]


def _rank(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, folder: str, pipe: Connection
) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":  # a test run that is killed would leave ranks that hold its pipes open
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    try:
        store = dist.FileStore(os.path.join(folder, "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
        answer = (True, function(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()
    os._exit(0)  # a forked copy of the test run must not run its exit handlers
