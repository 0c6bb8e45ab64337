"""Figures of hand-made spans whose answers are plain to see."""

from __future__ import annotations

import pytest

from fp8moe.profile.figures import kind_of, length, num_microbatches, overlap, rank_figures, union, window_of, without
from fp8moe.profile.kineto import Kernel, communication_streams, device_figures, kernels
from fp8moe.profile.spans import COMMUNICATION, COMPUTE, REPLICAS, Span
from fp8moe.schedule.build import build_schedule
from fp8moe.schedule.simulate import Costs, simulate
from fp8moe.train.step_trace import measured_costs


def compute(name: str, start: float, end: float) -> Span:
    return Span(name, COMPUTE, start, end)


def message(name: str, start: float, end: float) -> Span:
    return Span(f"message {name}", COMMUNICATION, start, end)


# One forward of two phases and a backward; 1 s of idleness between them, 3 s of waiting for the stage before.
RANK = [
    compute("wait RECV_F1.0<-rank 0", 10.0, 13.0),
    compute("F attn", 10.0, 15.0),
    message("dispatch", 15.0, 19.0),  # 4 s, of which the last 1 is waited for
    compute("F dispatch", 15.0, 15.5),
    compute("wait dispatch", 18.0, 19.0),
    compute("F mlp", 15.5, 21.0),
    compute("F1.0", 10.0, 21.0),
    message("combine", 21.0, 23.0),  # 2 s, none waited for; the last half under nothing
    compute("B mlp", 22.0, 24.0),
    compute("W mlp", 24.0, 25.0),
    compute("BW1.0", 22.0, 25.0),
    compute("optimizer", 25.0, 40.0),
]


def test_a_rank_whose_figures_are_known() -> None:
    assert window_of([RANK]) == (10.0, 25.0)
    figures = rank_figures(RANK, (9.0, 27.0))  # another rank began before it and ended after it
    assert figures.communication == 6.0
    assert figures.exposed == 1.0
    assert figures.hidden == pytest.approx(1 - 1 / 6)
    assert figures.computing == 11 - 3 - 1 + 3
    assert figures.bubble == (27 - 9) - 10 - 1  # 3 waited, 1 between the actions, 1 + 2 at the ends
    assert figures.phases == {"F attn": 2.0, "F dispatch": 0.5, "F mlp": 4.5, "B mlp": 2.0, "W mlp": 1.0}
    assert figures.step == 30.0  # 3 + 1 waited, 10 in phases, 1 between the actions that nothing names
    assert figures.parts == {"wait for stages": 3.0, "wait for layers": 1.0, "optimizer": 15.0, "other": 1.0}


def test_waits_belong_to_what_is_waited_for_and_to_no_other_part() -> None:
    spans = [
        compute("data", 0.0, 2.0),
        compute("F0.0", 2.0, 4.0),
        Span("message gradients", REPLICAS, 3.0, 7.0),
        compute("wait gradients", 5.0, 7.0),
        compute("reduce", 4.0, 8.0),
        compute("wait until all has left", 8.5, 9.0),
        compute("optimizer", 8.0, 10.0),
    ]
    figures = rank_figures(spans, (2.0, 4.0))
    assert figures.parts == {
        "data": 2.0, "reduce": 2.0, "optimizer": 1.5, "wait for replicas": 2.0, "wait for stages": 0.5, "other": 2.0,
    }  # fmt: skip
    assert sum(figures.parts.values()) + sum(figures.phases.values()) == figures.step == 10.0


def test_nothing_sent_hides_nothing() -> None:
    figures = rank_figures([compute("F0.0", 0.0, 1.0)], (0.0, 1.0))
    assert (figures.communication, figures.hidden, figures.bubble) == (0.0, None, 0.0)


def test_what_kind_a_name_is() -> None:
    names = ("F2.7", "F0.3&BW1.1", "B0.10", "F attn", "W mlp", "message dispatch backward", "wait combine", "optimizer")
    kinds = ["action", "action", "action", "phase", "phase", "message", "wait", "rest"]
    assert [kind_of(name) for name in names] == kinds


def test_intervals() -> None:
    a = union([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (3.0, 4.0), (7.0, 7.0)])
    assert a == [(0.0, 4.0), (5.0, 6.0)]
    b = [(-1.0, 1.0), (3.5, 5.5), (5.75, 9.0)]
    assert overlap(a, b) == [(0.0, 1.0), (3.5, 4.0), (5.0, 5.5), (5.75, 6.0)]
    assert (length(a), without(a, b), without(b, a)) == (5.0, 2.75, 2 + 2 + 3.25 - 2.25)


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_costs_of_a_simulated_run_are_those_it_was_made_of(name: str) -> None:
    """Spans as the simulator says, with a phase in each action and a wait in front of each."""
    pair = 2.5 if name.startswith("dual") else None
    schedule, costs = build_schedule(name, 2, 8), Costs(1.0, 2.0, 0.75, pair)
    ranks = []
    for timeds in simulate(schedule, costs).ranks:
        spans: list[Span] = []
        for number, timed in enumerate(timeds):
            if timed.action.kind.is_message:
                continue
            action, waited = str(timed.action), timed.start + number  # room for the wait
            start, end = waited + 0.5, waited + 0.5 + timed.end - timed.start
            if action.startswith("BW"):
                spans.append(compute("W mlp", end - 0.75, end))
            spans += [compute("wait RECV_F1.0<-rank 0", waited, start), compute(action, waited, end)]
        ranks.append(spans)
    assert num_microbatches(ranks) == 8
    found = measured_costs(ranks, schedule.num_stages)
    assert (found.forward, found.backward, found.weight, found.overlapped) == pytest.approx((1.0, 2.0, 0.75, pair))
    assert found.stages == pytest.approx([1.0] * schedule.num_stages)


def exported(offset: float, *events: tuple[str, str, int, float, float, int]) -> dict[str, list[dict[str, object]]]:
    """As torch.profiler writes it: (category, name, thread or stream, start, end, correlation), microseconds."""
    return {
        "traceEvents": [
            {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": tid, "ts": (start + offset) * 1e6,
             "dur": (end - start) * 1e6, "args": {"correlation": number, "stream": tid}}
            for cat, name, tid, start, end, number in events
        ]
    }  # fmt: skip


def test_kernels_of_a_known_step() -> None:
    """The host enqueues everything in the first seconds; the device runs two streams later."""
    spans = [
        compute("F attn", 0.0, 1.0), compute("F dispatch", 1.0, 1.5), message("dispatch", 1.25, 1.75),
        compute("F mlp", 2.0, 3.0), compute("F0.0", 0.0, 3.0), compute("optimizer", 8.0, 9.5),
    ]  # fmt: skip
    trace = exported(
        1000.0,
        ("user_annotation", "F attn", 1, 0.0, 1.0, 0),
        ("user_annotation", "F dispatch", 1, 1.0, 1.5, 0),
        ("user_annotation", "F mlp", 1, 2.0, 3.0, 0),
        ("cuda_runtime", "cudaLaunchKernel", 2, 0.5, 0.5, 1),
        ("cuda_runtime", "cudaMemcpyAsync", 3, 1.5, 1.5, 2),
        ("cuda_runtime", "cudaLaunchKernel", 1, 2.5, 2.5, 3),
        ("cuda_runtime", "cudaLaunchKernel", 1, 1.125, 1.125, 4),
        ("cuda_runtime", "cudaLaunchKernel", 1, 9.0, 9.0, 5),
        ("kernel", "gemm", 7, 1.0, 5.0, 1),
        ("gpu_memcpy", "Memcpy DtoD", 20, 3.0, 9.0, 2),
        ("kernel", "gemm", 7, 7.0, 10.0, 3),
        ("kernel", "ncclDevKernel_SendRecv", 30, 0.0, 11.0, 4),  # between stages
        ("kernel", "adamw", 7, 20.0, 30.0, 5),  # of no action
    )
    work = kernels(trace, spans)
    assert [kernel.start for kernel in work] == pytest.approx([0.0, 1.0, 3.0, 7.0, 20.0])
    assert communication_streams(work, spans) == {20}
    busy = [Kernel("gemm", 9, 0.0, 1.0, launched) for launched in [1.5] * 9 + [0.5]]  # most of it beside a message
    just = [Kernel("copy", 21, 0.0, 1.0, 1.25 - 1e-5)]  # clocks differ a little
    assert communication_streams([*work, *busy, *just], spans) == {20, 21}
    figures = device_figures(work, spans)
    assert (figures.communication, figures.exposed) == pytest.approx((6.0, 2.0))  # 5 to 7
    assert figures.hidden == pytest.approx(2 / 3)
    assert (figures.window, figures.computing) == pytest.approx((11.0, 7.0))
    assert figures.bubble == pytest.approx(11 - 7 - 2)
    assert figures.phases == pytest.approx({"F attn": 4.0, "F mlp": 3.0})
    assert figures.parts == pytest.approx({"wait for layers": 2.0, "optimizer": 10.0, "other": 11.0})
    assert figures.step == pytest.approx(30.0)
    with pytest.raises(RuntimeError, match="none of the given spans"):
        kernels(trace, [compute("F other", 0.0, 1.0)])


def test_a_stream_of_communication_has_nearly_all_its_launches_inside_messages() -> None:
    spans = [message("dispatch", 1.0, 2.0)]
    for outside, found in ((1, {5}), (2, set())):  # 49 of 50 are 0.98
        work = [Kernel("copy", 5, 0.0, 1.0, 1.5)] * (50 - outside) + [Kernel("copy", 5, 0.0, 1.0, 3.0)] * outside
        assert communication_streams(work, spans) == found
