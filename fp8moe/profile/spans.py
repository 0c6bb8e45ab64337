"""Spans: named stretches of time, and their listeners: a step's stopwatch, the recorder of a trace, profilers.

Phases, actions, messages and waits give their names here and nothing else; without a listener a span costs a function
call. A span is named by what runs: "F attn", "B mlp", "W mlp" (a phase), "F2.7" (an action on stage 2, micro-batch 7),
"message dispatch" (on the communication thread), "wait dispatch", "wait RECV_F2.7<-rank 1" (by the phase in need).
Exposed communication is what the compute thread waits for messages. On a GPU the host does not wait, its stream does:
there `waiting` stands between two events of the current stream, and the Stopwatch reads the time between them once the
step is over, as it does its laps. A host that waits first holds the second event back, so that counts too.

Listeners belong to the process; spans come from its compute and its two communication threads, that of tokens and that
of gradients and weights between replicas; on a GPU, where one thread launches all, from what acts for them. Times are
those of `time.perf_counter`, which all processes of one machine share; `parallel.collectives.clock_offset` gives the
difference of two machines' clocks.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

COMPUTE, COMMUNICATION, REPLICAS = "compute", "communication", "replicas"  # names of threads
EXPOSED = "exposed_communication"
CAPTURED = "captured micro-batch"  # a span: forward and backward as one CUDA graph


class Listener(Protocol):
    """`began` may return anything, which is passed to the span's `ended`; both are called by the span's thread."""

    def began(self, name: str) -> Any: ...

    def ended(self, name: str, began: Any) -> None: ...


_waits: list[tuple[Any, Any]] = []  # (start, end) by the clock in force
_listeners: list[Listener] = []
_NOTHING = nullcontext()


def span(name: str) -> AbstractContextManager[None]:
    """Report what runs in the block to all listeners as `name`."""
    return _reported(name, tuple(_listeners)) if _listeners else _NOTHING


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the block, `listener` is told of every span that begins."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def unheard() -> Iterator[None]:
    """Within the block nobody is told of spans: what is captured has no time of its own."""
    listeners, _listeners[:] = _listeners[:], []
    try:
        yield
    finally:
        _listeners[:] = listeners


@contextmanager
def _reported(name: str, listeners: tuple[Listener, ...]) -> Iterator[None]:
    begun = [(listener, listener.began(name)) for listener in listeners]
    try:
        yield
    finally:
        for listener, began in reversed(begun):
            listener.ended(name, began)


class HostClock:
    """Times of the host, which computes itself."""

    def now(self) -> Any:
        return time.perf_counter()

    def seconds(self, start: Any, end: Any) -> float:
        return float(end - start)


class DeviceClock(HostClock):
    """Events on the current stream: when a GPU gets there, not when the host says so. `seconds` waits for the end."""

    def now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


_clock: list[HostClock] = [HostClock()]  # of waits: that of the last Stopwatch


@contextmanager
def waiting() -> Iterator[None]:
    """Count the time of the block as waiting for communication: the host's, or on a GPU the current stream's."""
    start = _clock[0].now()
    try:
        yield
    finally:
        _waits.append((start, _clock[0].now()))


def exposed() -> list[tuple[Any, Any]]:
    """The waits for communication since the last call: start and end, by the clock in force."""
    waits, _waits[:] = _waits[:], []
    return waits


def exposed_seconds() -> float:
    """Seconds this process has waited for communication since the last call; on a GPU it waits for the last of them."""
    return sum(_clock[0].seconds(*wait) for wait in exposed())


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


_acting = threading.local()


@contextmanager
def acting_as(name: str) -> Iterator[None]:
    """Within the block spans of this thread are those of the thread called `name`."""
    before = getattr(_acting, "name", None)
    _acting.name = name
    try:
        yield
    finally:
        _acting.name = before


class Recorder:
    """Records every span, in the order in which they end."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def began(self, name: str) -> float:
        return time.perf_counter()

    def ended(self, name: str, began: float) -> None:
        name_of_thread = getattr(_acting, "name", None) or threading.current_thread().name
        thread = name_of_thread if name_of_thread in (COMMUNICATION, REPLICAS) else COMPUTE
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
        elif name.startswith(("B ", "W ")) or name == CAPTURED:
            self._stopwatch.lap("backward")


class Stopwatch:
    """`lap(name)` adds the time since the last lap to `name`; `read()` gives the sums in seconds."""

    def __init__(self, device: torch.device) -> None:
        self._clock = _clock[0] = DeviceClock() if device.type == "cuda" else HostClock()
        self._laps: list[tuple[str, Any, Any, list[tuple[Any, Any]]]] = []
        exposed()  # forget what was waited for before
        self._last = self._clock.now()

    def lap(self, name: str) -> None:
        now = self._clock.now()
        self._laps.append((name, self._last, now, exposed()))
        self._last = now

    def read(self) -> dict[str, float]:
        """Seconds by name, EXPOSED among them; 0 for a name without laps. On a GPU it waits for the last lap."""
        seconds: defaultdict[str, float] = defaultdict(float)
        for name, start, end, waits in self._laps:
            waited = sum(self._clock.seconds(*wait) for wait in waits)
            seconds[name] += max(0.0, self._clock.seconds(start, end) - waited)
            seconds[EXPOSED] += waited
        return seconds
