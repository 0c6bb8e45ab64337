"""Forwards of a new token of each row as CUDA graphs (`layers.cuda_graph`): a call for the host, not a launch a kernel.

Few tokens launch as many kernels as thousands do, about 40 a layer, and those end long before the host has launched the
next. What is captured is a stretch of compute of one kind: so many rows, so many entries of each read. Kinds change
seldom: rows leave when half of them have ended, and lengths are rounded up, so that a graph serves 64 tokens or more
and at most an eighth of what is read lies behind the longest row. The first forward of a kind runs as always: it
compiles kernels, and libraries allocate. The second is captured, which runs it too; the others are replays. A stretch
has one graph at a time.

Where ranks share experts a replay can read no counts. Messages then have room for every routing, which few tokens can
afford, and stand between the graphs (`parallel.dispatch.captured`); forwards that run as always send the same ones,
since ranks don't capture at the same time. For that reason a capture waits for nothing: what a pipeline's rank has sent
may arrive when the other one has captured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp8moe.layers.cuda_graph import Captured, Graph, graphs_at_once, rounded
from fp8moe.layers.dispatch import Dispatcher
from fp8moe.layers.moe import MoE
from fp8moe.parallel.dispatch import make_dispatcher
from fp8moe.parallel.dispatch.captured import CapturableDispatcher
from fp8moe.parallel.mesh import Mesh


@dataclass(frozen=True)
class DecodingGraphs:
    """dispatcher: of the forwards that may be captured. make_graphs: gives what makes the graphs of one capture."""

    dispatcher: Dispatcher
    make_graphs: Callable[[], Callable[[], Graph]]


def decoding_graphs(
    mesh: Mesh, num_experts: int, tokens: int, make_graphs: Callable[[], Callable[[], Graph]] = graphs_at_once
) -> DecodingGraphs:
    """For forwards of at most `tokens` tokens of each rank."""
    dispatcher = make_dispatcher("all_to_all", mesh, num_experts, max_tokens=tokens, capacity_factor=math.inf)
    return DecodingGraphs(dispatcher if mesh.ep_group is None else CapturableDispatcher(dispatcher), make_graphs)


class CapturedForward:
    """A stretch of compute of `model` that is run again and again, or, without graphs, as it is."""

    def __init__(self, model: nn.Module, graphs: DecodingGraphs | None) -> None:
        self._graphs = graphs
        self._layers = [module for module in model.modules() if isinstance(module, MoE)]
        self._kind: tuple[object, ...] = ()
        self._given: tuple[Tensor, ...] = ()
        self._result: Tensor | None = None
        self._captured: Captured | None = None

    def length(self, length: int, most: int) -> int:
        """How many entries of a row are read where no row needs more than `length` and there are `most`."""
        return min(length, most) if self._graphs is None else rounded(length, most)

    def run(self, length: int, call: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """`call(*given)`, a tensor, where `length` entries of a row are read.

        Calls of one length and shapes of `given` are of one kind: they make the same launches, and whatever else they
        read or write lies where it lay. None may read anything to the host.
        """
        if self._graphs is None:
            return call(*given)
        kind = length, *(one.shape for one in given)
        if kind != self._kind or self._result is None:
            self._captured = None  # with its memory, before the next one's
            with self._dispatching(self._graphs.dispatcher):
                result = call(*given)
            self._kind, self._given = kind, tuple(map(torch.clone, given))
            self._result = torch.empty_like(result)
            return result
        for there, value in zip(self._given, given, strict=True):
            there.copy_(value)
        if self._captured is None:
            self._captured = self._capture(call, self._result, self._graphs)
        else:
            self._captured.replay()
        return self._result.clone()

    def _capture(self, call: Callable[..., Tensor], result: Tensor, graphs: DecodingGraphs) -> Captured:
        with self._dispatching(graphs.dispatcher):
            return Captured(lambda: result.copy_(call(*self._given)), graphs.make_graphs())

    @contextmanager
    def _dispatching(self, dispatcher: Dispatcher) -> Iterator[None]:
        usual = [layer.dispatcher for layer in self._layers]
        for layer in self._layers:
            layer.dispatcher = dispatcher
        try:
            yield
        finally:
            for layer, own in zip(self._layers, usual, strict=True):
                layer.dispatcher = own
