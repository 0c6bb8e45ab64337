"""The few collectives that the framework uses, timed: what a process spends waiting here is exposed communication.

Everything accepts `group=None` as the group of one, which does nothing: callers need no `if`. FP8 travels as bytes,
because gloo knows no float8.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

_exposed = [0.0]


@contextmanager
def _waiting() -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        _exposed[0] += time.perf_counter() - start


def exposed_seconds() -> float:
    """Seconds this process has waited for communication since the last call (host time; on GPUs a lower bound)."""
    seconds, _exposed[0] = _exposed[0], 0.0
    return seconds


def all_reduce(tensor: Tensor, group: ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce in place over `group`; returns the tensor."""
    if group is not None:
        with _waiting():
            dist.all_reduce(tensor, op=op, group=group)
    return tensor


def all_to_all(rows: Tensor, send: list[int], receive: list[int], group: ProcessGroup) -> Tensor:
    """rows [sum(send), ...] in order of destination -> [sum(receive), ...] in order of source."""
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    with _waiting():
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    return out


def exchange_counts(send: Tensor, group: ProcessGroup) -> Tensor:
    """send [W] int64, one number for each rank of the group -> what each rank sends here, [W]."""
    out = torch.empty_like(send)
    with _waiting():
        dist.all_to_all_single(out, send, group=group)
    return out
