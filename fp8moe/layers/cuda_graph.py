"""CUDA graphs of a stretch of compute: the host launches it once, kernel by kernel, from then on by a call a graph.

What is captured must be the same launches at the same addresses whenever it is replayed. Inputs are tensors that lie
still and are copied into before a replay; results stay where the capture put them, in the graphs' own memory pool,
until the next replay. A host that reads from the device, a shape that depends on data, memory that was freed: none of
these can be captured.

A message between ranks is the host's to start and to wait for. `outside` divides the stretch there: the graph before it
ends, the call is made, now and in every replay, and another graph begins. So a capture computes as well: each graph is
replayed once it is captured, and a call outside always meets the values of its turn.

The graphs share a pool: what one has freed the next may use, since they run in the order of their capture.
`capture_error_mode` is thread_local: threads of communication libraries, which ask for events at any time, would end a
capture of PyTorch's default mode. Autograd's own thread launches on the stream of the forward, which is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch

LEAST_STEP, STEPS = 64, 8
MODE = "thread_local"


class Graph(Protocol):
    """Work for the device, captured once."""

    def capturing(self) -> AbstractContextManager[Any]:
        """What the block launches is captured and does not run. Entered once."""
        ...

    def replay(self) -> None:
        """Run what was captured, on the current stream."""
        ...


class CudaGraph:
    """A `Graph` of the current GPU, captured on `stream` with memory from `pool`.

    waits: a capture begins when everything launched before has run, with the memory that is free then. It must not
    where a message is in flight whose receiver may be about to capture too: both would wait for each other.
    """

    def __init__(self, pool: Any, stream: torch.cuda.Stream, *, waits: bool = True) -> None:
        self._graph, self._pool, self._stream, self._waits = torch.cuda.CUDAGraph(), pool, stream, waits

    def capturing(self) -> AbstractContextManager[Any]:
        """See `Graph`."""
        if self._waits:
            return torch.cuda.graph(self._graph, pool=self._pool, stream=self._stream, capture_error_mode=MODE)
        return self._at_once()

    @contextmanager
    def _at_once(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            self._graph.capture_begin(pool=self._pool, capture_error_mode=MODE)
            try:
                yield
            finally:
                self._graph.capture_end()

    def replay(self) -> None:
        """See `Graph`."""
        self._graph.replay()


def cuda_graphs(*, waits: bool = True) -> Callable[[], Graph]:
    """What makes graphs of one pool. waits: see `CudaGraph`."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    return lambda: CudaGraph(pool, stream, waits=waits)


def graphs_at_once() -> Callable[[], Graph]:
    """The same, of captures that wait for nothing."""
    return cuda_graphs(waits=False)


class Captured:
    """`call` as graphs, with what it calls `outside` between them. Making it runs it.

    It has run before, so that kernels are compiled and libraries have their workspace. What it returns is let go:
    results that are wanted are written to tensors that lie outside.
    """

    def __init__(self, call: Callable[[], object], make_graph: Callable[[], Graph]) -> None:
        assert not _capturing, "one capture at a time"
        self._make_graph, self._steps, self._open = make_graph, list[Callable[[], None]](), ExitStack()
        _capturing.append(self)
        try:
            self._begin()
            call()
            self._end()
        finally:
            _capturing.clear()
            self._open.close()

    def replay(self) -> None:
        """Run it again."""
        for step in self._steps:
            step()

    def _begin(self) -> None:
        graph = self._make_graph()
        self._open.enter_context(graph.capturing())
        self._steps.append(graph.replay)

    def _end(self) -> None:
        self._open.close()
        self._steps[-1]()

    def call_outside(self, call: Callable[[], None]) -> None:
        """Make `call` here, between two graphs."""
        self._end()
        call()
        self._steps.append(call)
        self._begin()


def step_of(length: int) -> int:
    """By how much lengths near `length` are apart that are captured: 64, or an eighth of the power of two below."""
    return max(LEAST_STEP, (1 << (length.bit_length() - 1)) // STEPS)


def rounded(length: int, most: int) -> int:
    """A length that grows, up to one that is captured; at most `most`."""
    step = step_of(length)
    return min(-(-length // step) * step, most)


_capturing: list[Captured] = []


def capture() -> Captured | None:
    """The capture in progress, if there is one."""
    return _capturing[-1] if _capturing else None


def outside(call: Callable[[], None]) -> None:
    """Within a capture: make `call` between its graphs, now and in every replay. It keeps what it refers to alive."""
    _capturing[-1].call_outside(call)
