"""Listeners of spans: one keeps them, one hands them on to whatever profiler watches this process.

Times are perf_counter's, which all processes of one machine share. Across machines `clock_offset` brings them together:
the difference of two ranks' readings right behind a barrier, the median of several. A rank of the same machine has
none, however late the scheduler lets it look at the clock.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup

from fp8moe.parallel.collectives import gather
from fp8moe.parallel.trace import listening

COMPUTE, COMMUNICATION = "compute", "communication"
ROUNDS = 9


@dataclass(frozen=True, slots=True)
class Span:
    """A named stretch of time of one thread; start and end in seconds."""

    name: str
    thread: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def contains(self, other: Span) -> bool:
        """Whether `other`, of the same thread, lies within."""
        return self.thread == other.thread and self.start <= other.start and other.end <= self.end


class Recorder:
    """Keeps every span, in the order in which they end."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def began(self, name: str) -> float:
        return time.perf_counter()

    def ended(self, name: str, began: float) -> None:
        thread = COMMUNICATION if threading.current_thread().name == COMMUNICATION else COMPUTE
        self.spans.append(Span(name, thread, began, time.perf_counter()))


class Marks:
    """Spans as torch.profiler's annotations and, on a GPU, as NVTX ranges."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def began(self, name: str) -> Any:
        mark = torch.profiler.record_function(name)
        mark.__enter__()
        if self._cuda:
            torch.cuda.nvtx.range_push(name)
        return mark

    def ended(self, name: str, began: Any) -> None:
        if self._cuda:
            torch.cuda.nvtx.range_pop()
        began.__exit__(None, None, None)


@contextmanager
def marking(device: torch.device) -> Iterator[None]:
    """Within the block spans are marked where a profiler watches: torch's, or Nsight Systems (by its variable)."""
    watched = torch.autograd._profiler_enabled() or "NSYS_PROFILING_SESSION_ID" in os.environ
    with listening(Marks(device)) if watched else nullcontext():
        yield


def clock_offset(group: ProcessGroup | None) -> float:
    """What to add to this rank's perf_counter readings to have them on the clock of rank 0 of `group`. Collective."""
    readings = []
    machine = _machine()
    for _ in range(ROUNDS):
        gather(None, group)
        readings.append(time.perf_counter())
    first = gather((machine, readings), group)[0]
    if first[0] == machine:
        return 0.0
    return statistics.median(theirs - mine for theirs, mine in zip(first[1], readings, strict=True))


def _machine() -> str:
    """What tells this machine, since its last start, from any other: perf_counter counts from that start on Linux."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else f"{os.uname().nodename}"
