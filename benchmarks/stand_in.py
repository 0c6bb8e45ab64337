"""A stand-in for the all-to-all on one device: the same bytes, copied on the communication stream.

All experts are here, so nothing has to travel; but each message copies as many bytes as one to `peers` other ranks
would carry, starts and is waited for like one, and fans its rows out where it is waited for. A copy inside a GPU is far
quicker than a link: `repeats` copies the same bytes so often that a message takes as long as on a link.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from fp8moe.layers.dispatch import Announced, Dispatched, Handle, LocalDispatcher
from fp8moe.layers.operand import Rows
from fp8moe.parallel.dispatch.payload import row_bytes
from fp8moe.parallel.stream import communication_stream


class StandIn:
    """A `LocalDispatcher` whose verbs are messages. max_rows: the most that a verb is given; width: values a row."""

    def __init__(
        self, num_experts: int, device: torch.device, *, peers: int, max_rows: int, width: int, repeats: int = 1
    ) -> None:
        self._local = LocalDispatcher(num_experts)
        self.num_local_experts = num_experts
        self._device, self._peers, self.repeats = device, peers, repeats
        room = peers * max_rows * width * 4  # FP32 rows are the widest
        self._source = torch.zeros(room, dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)

    def announce(self, topk_ids_TK: Tensor) -> Announced:
        return self._local.announce(topk_ids_TK)

    def dispatch(self, rows_TD: Rows, announced: Announced, topk_weights_TK: Tensor) -> Handle[Dispatched]:
        return self._send(rows_TD, "dispatch", lambda: self._local.dispatch(rows_TD, announced, topk_weights_TK).wait())

    def combine(self, y_RD: Tensor, layout: Any) -> Handle[Tensor]:
        sums_TD = self._local.combine(y_RD, layout).wait()
        return self._send(sums_TD, "combine", lambda: sums_TD)

    def dispatch_backward(self, dx_RD: Tensor, dweights_R: Tensor, layout: Any) -> Handle[tuple[Tensor, Tensor]]:
        sums = self._local.dispatch_backward(dx_RD, dweights_R, layout).wait()
        return self._send(sums[0], "dispatch backward", lambda: sums)

    def combine_backward(self, dy_TD: Rows, layout: Any) -> Handle[Rows]:
        return self._send(dy_TD, "combine backward", lambda: self._local.combine_backward(dy_TD, layout).wait())

    def verify(self) -> None:
        """All rows have room."""

    def copy(self, num_bytes: int) -> None:
        """What a message does."""
        for _ in range(self.repeats):
            self._target[:num_bytes].copy_(self._source[:num_bytes])

    def bytes_of(self, rows: Rows) -> int:
        """Of a message that carries `rows` to all peers."""
        return self._peers * rows.shape[0] * row_bytes(rows)

    def _send(self, rows: Rows, name: str, finish: Any) -> Any:
        num_bytes = self.bytes_of(rows)
        return communication_stream(self._device).start(lambda: self.copy(num_bytes), lambda _: finish(), name)


def copies_as_slow_as(dispatcher: StandIn, num_bytes: int, bytes_per_second: float, device: torch.device) -> int:
    """How often `num_bytes` must be copied on `device` to take as long as on a link of that rate."""
    dispatcher.repeats = 20
    dispatcher.copy(num_bytes)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    dispatcher.copy(num_bytes)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    once = (time.perf_counter() - start) / 20
    return max(1, round(num_bytes / bytes_per_second / once))
