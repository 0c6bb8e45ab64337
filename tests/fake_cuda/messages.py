"""The dispatchers between ranks on fake tensors: one rank of eight, two nodes of four, whose messages go nowhere."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks import unsent_messages
from benchmarks.unsent_messages import RANKS, Arrived
from fp8moe.kernels.quantize import quantize_rows
from fp8moe.parallel.dispatch.all_to_all import AllToAllDispatcher
from fp8moe.parallel.dispatch.counts import Capacity, EpTopology
from fp8moe.parallel.dispatch.hops import HopGroup
from tests.fake_cuda.launching import on_fake_hopper
from tests.fake_cuda.recorder import Recorder
from tests.fake_cuda.trace import Trace

__all__ = ["RANKS", "one_hop", "trace_dispatch", "two_hops"]

NUM_EXPERTS, TOPK, DIM = 256, 8, 7168


def one_hop() -> tuple[EpTopology, tuple[HopGroup, ...]]:
    return unsent_messages.one_hop(NUM_EXPERTS)


def two_hops() -> tuple[EpTopology, tuple[HopGroup, ...]]:
    return unsent_messages.two_hops(NUM_EXPERTS)


def trace_dispatch(route: Callable[[], Any], precision: str, tokens: int, factor: float | None) -> Trace:
    """The four verbs of a dispatch of `tokens` tokens, each message arriving at once.

    factor: of fixed messages; None counts exactly, and stops before the counts are read, which a trace does not have.
    The phase of what the communication stream runs ends in "(communication)".
    """
    recorder = Recorder()

    def start(message: Callable[[], Any], finish: Callable[[Any], Any], name: str = "message", **_: Any) -> Arrived:
        with recorder.in_phase(f"{recorder.phase} (communication)"):
            return Arrived(message(), finish)

    with on_fake_hopper(recorder), unsent_messages.unsent_messages(start):
        capacity = None if factor is None else Capacity(tokens, factor)
        dispatcher = AllToAllDispatcher(*route(), capacity=capacity)
        x = torch.empty(tokens, DIM, dtype=torch.bfloat16, device="cuda")
        rows = quantize_rows(x, power_of_two=True) if precision == "fp8" else x
        ids = torch.zeros(tokens, TOPK, dtype=torch.int64, device="cuda")
        weights = torch.empty(tokens, TOPK, device="cuda")
        current = SimpleNamespace(record_event=lambda: None)
        with recorder.in_phase("announce"), mock.patch.object(torch.cuda, "current_stream", lambda device: current):
            announced = dispatcher.announce(ids)
        if factor is None:
            return recorder.trace
        with recorder.in_phase("dispatch"):
            arrived = dispatcher.dispatch(rows, announced, weights).wait()
        y = torch.empty(arrived.rows_RD.shape, dtype=torch.bfloat16, device="cuda")
        recorder.trace.facts["received rows"] = len(y)
        with recorder.in_phase("combine"):
            dispatcher.combine(y, arrived.state).wait()
        with recorder.in_phase("combine backward"):
            dispatcher.combine_backward(x, arrived.state, fp8=precision == "fp8").wait()
        with recorder.in_phase("dispatch backward"):
            dispatcher.dispatch_backward(y, arrived.weights_R, arrived.state).wait()
    return recorder.trace
