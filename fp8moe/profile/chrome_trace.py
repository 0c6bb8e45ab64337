"""A step of all ranks in the Trace Event Format, for ui.perfetto.dev or chrome://tracing.

A process is a rank, named by its place on the mesh and its stages; its threads are compute, communication and, on a
GPU, each stream. Times count from the first span of any rank, in microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fp8moe.profile.figures import kind_of
from fp8moe.profile.kineto import Kernel
from fp8moe.profile.recorder import COMMUNICATION, COMPUTE, Span

THREADS = (COMPUTE, COMMUNICATION)
FIRST_STREAM = 100  # thread number of a GPU's stream 0


@dataclass(frozen=True)
class RankTrace:
    """What one rank recorded, on the clock of rank 0; kernels only where there is a GPU."""

    name: str
    spans: list[Span]
    kernels: list[Kernel]


def chrome_trace(ranks: Sequence[RankTrace]) -> dict[str, Any]:
    """The trace as the object that the JSON file holds."""
    first = min(span.start for rank in ranks for span in rank.spans)
    events: list[dict[str, Any]] = []
    for pid, rank in enumerate(ranks):
        events.append(_says("process_name", pid, 0, name=rank.name))
        events.append(_says("process_sort_index", pid, 0, sort_index=pid))
        streams = sorted({kernel.stream for kernel in rank.kernels})
        tids = {name: tid for tid, name in enumerate(THREADS)} | {
            f"GPU stream {stream}": FIRST_STREAM + stream for stream in streams
        }
        for name, tid in tids.items():
            events.append(_says("thread_name", pid, tid, name=name))
            events.append(_says("thread_sort_index", pid, tid, sort_index=tid))
        slices = [(s.name, kind_of(s.name), tids[s.thread], s.start, s.end) for s in rank.spans]
        slices += [(k.name, "kernel", FIRST_STREAM + k.stream, k.start, k.end) for k in rank.kernels]
        # What contains comes before what is contained.
        for name, kind, tid, start, end in sorted(slices, key=lambda s: (s[3], -s[4])):
            events.append(
                {"ph": "X", "name": name, "cat": kind, "pid": pid, "tid": tid, "ts": (start - first) * 1e6,
                 "dur": (end - start) * 1e6}
            )  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _says(what: str, pid: int, tid: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args}
