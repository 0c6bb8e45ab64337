"""Listeners of spans: one records them, one passes them to profilers, one times a step's parts.

Times are perf_counter's, which all processes of one machine share. Across machines `parallel.collectives.clock_offset`
gives the difference of two ranks' clocks.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from fp8moe.profile.spans import exposed_seconds, listening

COMPUTE, COMMUNICATION = "compute", "communication"
EXPOSED = "exposed_communication"


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
    """Records every span, in the order in which they end."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def began(self, name: str) -> float:
        return time.perf_counter()

    def ended(self, name: str, began: float) -> None:
        thread = COMMUNICATION if threading.current_thread().name == COMMUNICATION else COMPUTE
        self.spans.append(Span(name, thread, began, time.perf_counter()))


class Marks:
    """Passes spans to torch.profiler as annotations and, on a GPU, to Nsight Systems as NVTX ranges."""

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
    """Within the block spans are passed to profilers, if one runs: torch's, or Nsight Systems (by its variable)."""
    profiled = torch.autograd._profiler_enabled() or "NSYS_PROFILING_SESSION_ID" in os.environ
    with listening(Marks(device)) if profiled else nullcontext():
        yield


class PhaseLaps:
    """Adds the time of a pipeline's phases to a stopwatch, as forward or backward."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch

    def began(self, name: str) -> None:
        """A phase's lap begins where the last one ended."""

    def ended(self, name: str, began: None) -> None:
        if name.startswith("F "):
            self._stopwatch.lap("forward")
        elif name.startswith(("B ", "W ")):
            self._stopwatch.lap("backward")


class Stopwatch:
    """`lap(name)` adds the time since the last lap to `name`; `read()` gives the sums in seconds."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._laps: list[tuple[str, Any, Any, float]] = []
        exposed_seconds()  # forget what was waited for before
        self._last = self._now()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, name: str) -> None:
        now = self._now()
        self._laps.append((name, self._last, now, exposed_seconds()))
        self._last = now

    def read(self) -> dict[str, float]:
        """Seconds by name, EXPOSED among them; 0 for a name without laps. On a GPU it waits for the last lap."""
        if self._cuda:
            self._last.synchronize()
        seconds: defaultdict[str, float] = defaultdict(float)
        for name, start, end, waited in self._laps:
            passed = start.elapsed_time(end) / 1e3 if self._cuda else end - start
            seconds[name] += max(0.0, passed - waited)
            seconds[EXPOSED] += waited
        return seconds
