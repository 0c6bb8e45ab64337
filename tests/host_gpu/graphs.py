"""CUDA graphs of this GPU: what was captured is recorded and done again, and the host may take no part in a capture.

It may not read, wait, or copy between its memory and the device's: the device refuses it (`device.cpp`), wherever it is
called from. A capture runs on the stream that was current.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.train.recorded_graph import RecordedGraph


class HostGpuGraph(RecordedGraph):
    """In place of `layers.cuda_graph.CudaGraph`. Autograd has a thread here; messages have none."""

    messages_have_threads = False

    def __init__(self, pool: Any, stream: Any, *, waits: bool = True) -> None:
        super().__init__()
        self._waits = waits

    @contextmanager
    def capturing(self) -> Iterator[None]:
        if self._waits:
            torch.cuda.synchronize()
        with super().capturing():
            torch.ops.host_gpu.capture(True)
            try:
                yield
            finally:
                torch.ops.host_gpu.capture(False)
