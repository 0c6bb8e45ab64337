"""GPU kernels of a step, read from torch.profiler's trace, on the clock of the recorded spans.

The profiler's times have an origin of their own. It also sees the compute thread's spans, as annotations, so the
difference of the clocks is the median over those. (It does not see annotations of other threads.) A kernel belongs to
the phase during which it was launched: autograd launches from a thread of its own while the phase waits for it.

A stream is one of communication if its work was launched while a message was: NCCL's for collectives, and the
communication stream. A compute stream gets some of its work then too, but never all of it. NCCL's kernels elsewhere are
messages between stages; they wait for peers, so they count neither as computing nor as communication.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fp8moe.profile.figures import (
    FOR_LAYERS,
    Intervals,
    RankFigures,
    kind_of,
    length,
    spans_of,
    union,
    with_other,
    without,
)
from fp8moe.profile.spans import COMMUNICATION, COMPUTE, Span

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
MOST, SLACK = 0.98, 5e-5  # of a stream's launches; seconds around a message, by which the clocks may differ


@dataclass(frozen=True, slots=True)
class Kernel:
    """Device work (a kernel, copy or fill): seconds on the spans' clock; launched: when the host asked for it."""

    name: str
    stream: int
    start: float
    end: float
    launched: float


@contextmanager
def profiling(device: torch.device) -> Iterator[Callable[[Sequence[Span]], list[Kernel]]]:
    """torch.profiler around the block; afterwards, given the block's spans, its kernels (none without one)."""
    if device.type != "cuda":
        yield lambda spans: []
        return
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        yield lambda spans: kernels(_exported(profiler), spans)
        torch.cuda.synchronize()


def _exported(profiler: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        exported: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return exported


def kernels(exported: Mapping[str, Any], spans: Sequence[Span]) -> list[Kernel]:
    """Device work in a Chrome trace of torch.profiler, in order of start; its annotations must be among `spans`."""
    events = [event for event in exported["traceEvents"] if event.get("ph") == "X"]
    on_device = [event for event in events if event.get("cat") in ON_DEVICE]
    if not on_device:
        return []
    offset = _offset(events, spans)
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    found = []
    for event in on_device:
        start, end = event["ts"], event["ts"] + event["dur"]
        launched = launches.get(event["args"].get("correlation"), start)
        times = (time / 1e6 + offset for time in (start, end, launched))
        found.append(Kernel(event["name"], int(event["args"].get("stream", event["tid"])), *times))
    return sorted(found, key=lambda kernel: kernel.start)


def _offset(events: Sequence[Mapping[str, Any]], spans: Sequence[Span]) -> float:
    """perf_counter minus the profiler's clock, in seconds: the n-th span of a name is the n-th annotation of it."""
    marked: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "user_annotation":
            marked[event["name"]].append(event["ts"] / 1e6)
    recorded: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        if span.thread == COMPUTE:
            recorded[span.name].append(span.start)
    differences = [
        mine - theirs
        for name in recorded
        if len(recorded[name]) == len(marked[name])
        for mine, theirs in zip(sorted(recorded[name]), sorted(marked[name]), strict=True)
    ]
    if not differences:
        raise RuntimeError("torch.profiler recorded none of the given spans: give the spans of the profiled step")
    return statistics.median(differences)


def communication_streams(work: Sequence[Kernel], spans: Sequence[Span]) -> frozenset[int]:
    """Streams whose work was launched inside messages."""
    messages = union((span.start - SLACK, span.end + SLACK) for span in spans if span.thread == COMMUNICATION)
    launches: dict[int, list[bool]] = defaultdict(list)
    for kernel in work:
        launches[kernel.stream].append(_within(kernel.launched, messages) is not None)
    return frozenset(stream for stream, inside in launches.items() if sum(inside) >= MOST * len(inside))


def device_figures(work: Sequence[Kernel], spans: Sequence[Span]) -> RankFigures:
    """The figures of a rank from the kernels that its actions launched; the window is theirs, first to last."""
    streams = communication_streams(work, spans)
    whole = work
    actions = union((span.start, span.end) for span in spans if kind_of(span.name) == "action")
    work = [k for k in work if actions[0][0] <= k.launched <= actions[-1][1]]
    messages = union((k.start, k.end) for k in work if k.stream in streams)
    compute = [k for k in work if k.stream not in streams and "nccl" not in k.name.lower()]
    computing = union((k.start, k.end) for k in compute)
    named = sorted((span for span in spans if kind_of(span.name) == "phase"), key=lambda span: span.start)
    spots: Intervals = [(span.start, span.end) for span in named]
    phases: dict[str, float] = defaultdict(float)
    for kernel in compute:
        at = _within(kernel.launched, spots)
        if at is not None:
            phases[named[at].name] += kernel.end - kernel.start
    window, exposed = max(k.end for k in work) - min(k.start for k in work), without(messages, computing)
    bubble = max(0.0, window - length(computing) - exposed)
    step = max(k.end for k in whole) - min(k.start for k in whole)
    parts = with_other({FOR_LAYERS: exposed, **_rest(whole, spans)}, phases, step)
    return RankFigures(window, length(computing), length(messages), exposed, bubble, dict(phases), parts, step)


def _rest(work: Sequence[Kernel], spans: Sequence[Span]) -> dict[str, float]:
    """Seconds of the kernels that `data`, `reduce` and `optimizer` launched, those of messages included."""
    named = sorted(spans_of(spans, "rest"), key=lambda span: span.start)
    spots: Intervals = [(span.start, span.end) for span in named]
    times: dict[str, Intervals] = defaultdict(list)
    for kernel in work:
        at = _within(kernel.launched, spots)
        if at is not None:
            times[named[at].name].append((kernel.start, kernel.end))
    return {name: length(union(intervals)) for name, intervals in times.items()}


def _within(time: float, times: Intervals) -> int | None:
    """Which of disjoint, sorted intervals `time` lies in."""
    at = bisect_right(times, (time, float("inf"))) - 1
    return at if at >= 0 and time <= times[at][1] else None
