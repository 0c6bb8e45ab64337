"""Trace Event Format: its events, and a recorded step of all ranks, for ui.perfetto.dev or chrome://tracing.

In a recorded step a process is a rank, named by its place on the mesh and its stages; its threads are compute,
communication and, on a GPU, each stream. Times count from the first span of any rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fp8moe.profile.figures import kind_of
from fp8moe.profile.kineto import Kernel
from fp8moe.profile.spans import COMMUNICATION, COMPUTE, REPLICAS, Span

THREADS = (COMPUTE, COMMUNICATION, REPLICAS)
FIRST_STREAM = 100  # thread number of a GPU's stream 0


@dataclass(frozen=True)
class RankTrace:
    """What one rank recorded, on the clock of rank 0; kernels only where there is a GPU."""

    name: str
    spans: list[Span]
    kernels: list[Kernel]


def metadata(what: str, pid: int, tid: int = 0, **args: Any) -> dict[str, Any]:
    """The event that names or orders a process or thread; `what` is process_name, thread_name, thread_sort_index..."""
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args}


def named_thread(pid: int, tid: int, name: str) -> list[dict[str, Any]]:
    """The two events that name a thread and place it in order of `tid`."""
    return [metadata("thread_name", pid, tid, name=name), metadata("thread_sort_index", pid, tid, sort_index=tid)]


def slice_event(
    name: str, category: str, pid: int, tid: int, start: float, duration: float, args: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The event of something that took time, `start` and `duration` in microseconds."""
    event = {"ph": "X", "name": name, "cat": category, "pid": pid, "tid": tid, "ts": start, "dur": duration}
    return event if args is None else {**event, "args": args}


def trace_file(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The object that a trace's JSON file holds."""
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def step_trace(ranks: Sequence[RankTrace]) -> dict[str, Any]:
    """A recorded step as the object that its JSON file holds."""
    first = min(span.start for rank in ranks for span in rank.spans)
    events: list[dict[str, Any]] = []
    for pid, rank in enumerate(ranks):
        events.append(metadata("process_name", pid, name=rank.name))
        events.append(metadata("process_sort_index", pid, sort_index=pid))
        streams = sorted({kernel.stream for kernel in rank.kernels})
        tids = {name: tid for tid, name in enumerate(THREADS)} | {
            f"GPU stream {stream}": FIRST_STREAM + stream for stream in streams
        }
        for name, tid in tids.items():
            events += named_thread(pid, tid, name)
        slices = [(s.name, kind_of(s.name), tids[s.thread], s.start, s.end) for s in rank.spans]
        slices += [(k.name, "kernel", FIRST_STREAM + k.stream, k.start, k.end) for k in rank.kernels]
        # What contains comes before what is contained.
        for name, kind, tid, start, end in sorted(slices, key=lambda s: (s[3], -s[4])):
            events.append(slice_event(name, kind, pid, tid, (start - first) * 1e6, (end - start) * 1e6))
    return trace_file(events)
