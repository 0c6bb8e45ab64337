"""The dispatchers between ranks on fake tensors: one rank of eight, two nodes of four, whose messages go nowhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fp8moe.kernels.quantize import quantize_rows
from fp8moe.parallel.dispatch import all_to_all, counts, hops
from fp8moe.parallel.dispatch.all_to_all import AllToAllDispatcher
from fp8moe.parallel.dispatch.counts import Capacity, EpTopology
from fp8moe.parallel.dispatch.hops import HopGroup
from tests.fake_cuda.launching import on_fake_hopper
from tests.fake_cuda.recorder import Recorder
from tests.fake_cuda.trace import Trace

RANKS, NUM_EXPERTS, TOPK, DIM = 8, 256, 8, 7168


def group(size: int) -> Any:
    return SimpleNamespace(size=lambda: size, rank=lambda: 1)


def one_hop() -> tuple[EpTopology, tuple[HopGroup, ...]]:
    topology = EpTopology(group(RANKS), NUM_EXPERTS, nodes=RANKS, ranks_per_node=1)
    return topology, (HopGroup(topology.group, topology.local_experts),)


def two_hops() -> tuple[EpTopology, tuple[HopGroup, ...]]:
    topology = EpTopology(group(RANKS), NUM_EXPERTS, nodes=2, ranks_per_node=4)
    e = topology.local_experts
    return topology, (HopGroup(group(2), 4 * e), HopGroup(group(4), e))


class _Arrived:
    def __init__(self, value: Any, finish: Callable[[Any], Any]) -> None:
        self._value, self._finish = value, finish

    def arrived(self) -> Any:
        return self._value

    def wait(self) -> Any:
        return self._finish(self._value)


def trace_dispatch(route: Callable[[], Any], precision: str, tokens: int, factor: float | None) -> Trace:
    """The four verbs of a dispatch of `tokens` tokens, each message arriving at once.

    factor: of fixed messages; None counts exactly, and stops behind the counts, whose numbers a trace does not have.
    The phase of what the communication stream runs ends in "(communication)".
    """
    recorder = Recorder()

    def start(
        message: Callable[[], Any], finish: Callable[[Any], Any], name: str = "message", *, takes_sms: bool = True
    ) -> _Arrived:
        with recorder.in_phase(f"{recorder.phase} (communication)"):
            return _Arrived(message(), finish)

    def start_all_to_all(rows: Tensor, send: list[int], receive: list[int], *rest: Any) -> Any:
        out = rows.contiguous().new_empty(sum(receive), *rows.shape[1:])
        return SimpleNamespace(wait=lambda: out)

    with on_fake_hopper(recorder), ExitStack() as stack:
        stream = SimpleNamespace(start=start)
        for module, name, replacement in (
            (all_to_all, "communication_stream", lambda device: stream),
            (hops, "start_all_to_all", start_all_to_all),
            (counts, "exchange", lambda send, *rest: send.contiguous().clone()),
        ):
            stack.enter_context(mock.patch.object(module, name, replacement))
        capacity = None if factor is None else Capacity(tokens, factor)
        dispatcher = AllToAllDispatcher(*route(), capacity=capacity)
        x = torch.empty(tokens, DIM, dtype=torch.bfloat16, device="cuda")
        rows = quantize_rows(x, power_of_two=True) if precision == "fp8" else x
        ids = torch.zeros(tokens, TOPK, dtype=torch.int64, device="cuda")
        weights = torch.empty(tokens, TOPK, device="cuda")
        with recorder.in_phase("announce"):
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
