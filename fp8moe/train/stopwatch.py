"""Where a step's time goes: laps, on the clock that tells the truth for the device.

On a CPU a lap is host time. On a GPU the host runs ahead of the device, so a lap is a pair of events on the stream,
and is read after the step, when its loss was read and all work is done anyway. What a lap waited for communication is
taken out of it and booked as exposed.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch

from fp8moe.parallel.collectives import exposed_seconds

EXPOSED = "exposed_communication"


class PhaseLaps:
    """Listens to a pipeline's phases and books them on a stopwatch, as forward or backward."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch

    def began(self, name: str) -> None:
        """A phase's lap begins where the last one ended."""

    def ended(self, name: str, began: None) -> None:
        if name.startswith("F "):
            self._watch.lap("forward")
        elif name.startswith(("B ", "W ")):
            self._watch.lap("backward")


class Stopwatch:
    """`lap(name)` books what passed since the last lap under `name`; `read()` gives the sums in seconds."""

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
