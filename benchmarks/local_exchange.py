"""A simulated all-to-all on one device: each message copies as many bytes as a real one, on the communication stream.

All experts are on this rank, so no row has to travel. A message still copies the bytes that one to `peers` other ranks
would carry; it is started and waited for like one, and permutes its rows to the experts where it is waited for. A copy
inside a GPU is far quicker than a link: it is repeated (`repeats`) until a message takes as long as on a link.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from fp8moe.kernels.permute import permute
from fp8moe.layers.dispatch import Announced, Dispatched, Handle, LocalDispatcher, gradient_rows
from fp8moe.layers.operand import Rows
from fp8moe.parallel.device_stream import communication_stream
from fp8moe.parallel.dispatch.payload import row_bytes

TIMED_COPIES = 20


class LocalExchange:
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

    def combine(self, y_RD: Tensor, state: Any) -> Handle[Tensor]:
        sums_TD = self._local.combine(y_RD, state).wait()
        return self._send(sums_TD, "combine", lambda: sums_TD)

    def dispatch_backward(self, dx_RD: Tensor, dweights_R: Tensor, state: Any) -> Handle[tuple[Tensor, Tensor]]:
        sums = self._local.dispatch_backward(dx_RD, dweights_R, state).wait()
        return self._send(sums[0], "dispatch backward", lambda: sums)

    def combine_backward(self, dy_TD: Tensor, state: Any, *, fp8: bool = False) -> Handle[Rows]:
        rows_TD = gradient_rows(dy_TD, fp8=fp8)
        return self._send(rows_TD, "combine backward", lambda: permute(rows_TD, state))

    def verify(self) -> None:
        """One rank has room for all rows."""

    def copy(self, num_bytes: int) -> None:
        """Copy `num_bytes`, `repeats` times: the work of one message."""
        for _ in range(self.repeats):
            self._target[:num_bytes].copy_(self._source[:num_bytes])

    def bytes_of(self, rows: Rows) -> int:
        """Bytes of a message that carries `rows` to all peers."""
        return self._peers * rows.shape[0] * row_bytes(rows)

    def _send(self, rows: Rows, name: str, finish: Any) -> Any:
        num_bytes = self.bytes_of(rows)
        return communication_stream(self._device).start(lambda: self.copy(num_bytes), lambda _: finish(), name)


def repeats_for_bandwidth(
    exchange: LocalExchange, num_bytes: int, bytes_per_second: float, device: torch.device
) -> int:
    """How many copies of `num_bytes` on `device` take as long as one transfer over a link of that bandwidth."""
    exchange.repeats = TIMED_COPIES
    exchange.copy(num_bytes)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    exchange.copy(num_bytes)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    one_copy = (time.perf_counter() - start) / TIMED_COPIES
    return max(1, round(num_bytes / bytes_per_second / one_copy))
