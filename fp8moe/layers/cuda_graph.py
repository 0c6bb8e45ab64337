"""CUDA graph: a stretch of compute that the host launches once, kernel by kernel, and from then on by one call.

What is captured must be the same launches at the same addresses whenever it is replayed. Inputs are tensors that lie
still and are copied into before a replay; results stay where the capture put them, in the graph's own memory pool,
until the next replay. A host that reads from the device, a shape that depends on data, memory that was freed: none of
these can be captured.

`capture_error_mode` is thread_local: threads of communication libraries, which ask for events at any time, would end a
capture of PyTorch's default mode. Autograd's own thread launches on the stream of the forward, which is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class Graph(Protocol):
    """Work for the device, captured once."""

    def capturing(self) -> AbstractContextManager[Any]:
        """What the block launches is captured and does not run. Entered once."""
        ...

    def replay(self) -> None:
        """Run what was captured, on the current stream."""
        ...


class CudaGraph:
    """A `Graph` of the current GPU."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def capturing(self) -> AbstractContextManager[Any]:
        """See `Graph`; on a stream of its own, after everything launched before has run."""
        return torch.cuda.graph(self._graph, capture_error_mode="thread_local")

    def replay(self) -> None:
        """See `Graph`."""
        self._graph.replay()


def captured(call: Callable[[], object], make_graph: Callable[[], Graph] = CudaGraph) -> Callable[[], None]:
    """`call` as a graph; it has run once before, so that kernels are compiled and libraries have their workspace.

    What it returned is let go: results that are wanted are written to tensors that live outside.
    """
    graph = make_graph()
    with graph.capturing():
        call()
    return graph.replay
