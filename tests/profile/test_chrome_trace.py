"""The trace of a recorded step, event by event."""

from __future__ import annotations

from fp8moe.profile.chrome_trace import RankTrace, slice_event, step_trace, trace_file
from fp8moe.profile.kineto import Kernel
from fp8moe.profile.spans import COMMUNICATION, COMPUTE, Span


def test_ranks_are_processes_and_times_count_from_the_first_span_of_any() -> None:
    early = RankTrace("rank 0", [Span("F attn", COMPUTE, 2.0, 3.0), Span("F0.0", COMPUTE, 2.0, 4.0)], [])
    late = RankTrace(
        "rank 1",
        [Span("message dispatch", COMMUNICATION, 2.5, 2.75), Span("wait dispatch", COMPUTE, 2.25, 2.5)],
        [Kernel("gemm", 7, 3.0, 3.5, 2.0), Kernel("copy", 3, 2.75, 3.0, 2.0)],
    )
    trace = step_trace([early, late])
    assert trace["displayTimeUnit"] == "ms"
    events = trace["traceEvents"]
    told = [(e["name"], e["pid"], e["tid"], *e["args"].values()) for e in events if e["ph"] == "M"]
    host = [(0, "compute"), (1, "communication"), (2, "replicas")]
    threads = {0: host,
               1: [*host, (103, "GPU stream 3"), (107, "GPU stream 7")]}  # fmt: skip
    assert told == [
        entry
        for pid in (0, 1)
        for entry in [
            ("process_name", pid, 0, f"rank {pid}"),
            ("process_sort_index", pid, 0, pid),
            *[
                (what, pid, tid, value)
                for tid, name in threads[pid]
                for what, value in (("thread_name", name), ("thread_sort_index", tid))
            ],
        ]
    ]
    slices = [(e["name"], e["cat"], e["pid"], e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert slices == [
        ("F0.0", "action", 0, 0, 0.0, 2e6),  # what contains comes first
        ("F attn", "phase", 0, 0, 0.0, 1e6),
        ("wait dispatch", "wait", 1, 0, 0.25e6, 0.25e6),
        ("message dispatch", "message", 1, 1, 0.5e6, 0.25e6),
        ("copy", "kernel", 1, 103, 0.75e6, 0.25e6),
        ("gemm", "kernel", 1, 107, 1e6, 0.5e6),
    ]


def test_a_slice_has_arguments_where_they_are_given() -> None:
    assert "args" not in slice_event("F", "phase", 0, 1, 2.0, 3.0)
    with_arguments = slice_event("F", "phase", 0, 1, 2.0, 3.0, {"stage": 4})
    assert with_arguments == {"ph": "X", "name": "F", "cat": "phase", "pid": 0, "tid": 1, "ts": 2.0, "dur": 3.0,
                              "args": {"stage": 4}}  # fmt: skip
    assert trace_file([with_arguments])["traceEvents"] == [with_arguments]
