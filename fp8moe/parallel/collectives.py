"""The few collectives that the framework uses: timed, counted, and watched.

What a process spends waiting here is exposed communication. Everything accepts `group=None` as the group of one, which
does nothing: callers need no `if`. FP8 travels as bytes, because gloo knows no float8. Every collective says what it is
to the watch (`hang.py`), so that a failed one can name the rank that stayed away.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fp8moe.parallel import hang
from fp8moe.profile.spans import waiting

CLOCK_ROUNDS = 9
_sent: Counter[tuple[str, int]] = Counter()


def sent_bytes() -> dict[tuple[str, int], int]:
    """Payload bytes handed to all-to-alls for other ranks since the last call, by group's name and peer in it."""
    counted = dict(_sent)
    _sent.clear()
    return counted


def all_reduce(tensor: Tensor, group: ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce in place over `group`; returns the tensor."""
    if group is not None:
        with waiting(), hang.collective(group, "all_reduce"):
            dist.all_reduce(tensor, op=op, group=group)
    return tensor


def gather(value: Any, group: ProcessGroup | None) -> list[Any]:
    """What every rank of `group` has, in order of rank; by pickle, on the host: for the end of a run, no step."""
    if group is None:
        return [value]
    values: list[Any] = [None] * group.size()
    with waiting(), hang.collective(group, "all_gather (objects)"):
        dist.all_gather_object(values, value, group=group)
    return values


class Message:
    """An all-to-all under way; it owns its buffers. timeout: seconds, where its parts don't keep the group's own."""

    def __init__(
        self, out: Tensor, rows: Tensor, works: list[Any], note: hang.Note, *, timeout: float | None = None
    ) -> None:
        self._out, self._rows, self._works, self._note, self._timeout = out, rows, works, note, timeout

    def wait(self) -> Tensor:
        """[sum(receive), ...] in order of source. On a GPU the current stream waits, not the host."""
        with self._note:
            if self._timeout is None:
                for work in self._works:
                    work.wait()
            else:
                deadline = time.monotonic() + self._timeout
                for work in self._works:
                    work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
        return self._out


def start_all_to_all(rows: Tensor, send: list[int], receive: list[int], group: ProcessGroup, name: str) -> Message:
    """Send rows [sum(send), ...], in order of destination; `name` says what they are, for errors."""
    rows = rows.contiguous()
    _count(group, send, rows.element_size() * rows[0].numel() if len(rows) else 0)
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    note = hang.collective(group, f"all_to_all ({name})")
    with note:
        if rows.device.type == "cpu":
            works = _both_ways(out.split(receive), rows.split(send), group)
            return Message(out, rows, works, note, timeout=_timeout_of(group, rows.device))
        work = dist.all_to_all_single(out, rows, receive, send, group=group, async_op=True)
    return Message(out, rows, [work], note)


def _both_ways(parts: Sequence[Tensor], send: Sequence[Tensor], group: ProcessGroup) -> list[Any]:
    """The all-to-all by pairs, for gloo: all receives are posted, then all sends -> what is to be waited for.

    Gloo tells a sender that its receiver is ready in the byte stream that carries the receiver's own rows, and its own
    all-to-all posts each receive behind the send. Where two ranks start a moment apart, the rows of the first then wait
    until those of the second have passed: a link that is used one way at a time, half as fast.
    """
    me, size = group.rank(), group.size()
    peers = [(me + i) % size for i in range(1, size)]  # in turn, so that not everybody sends to the same rank first
    works = [dist.irecv(parts[i], group=group, group_src=i) for i in peers if len(parts[i])]
    works += [dist.isend(send[i], group=group, group_dst=i) for i in peers if len(send[i])]
    parts[me].copy_(send[me])
    return works


def _timeout_of(group: ProcessGroup, device: torch.device) -> float:
    """The group's timeout in seconds as it is now; gloo's receives would keep that which the group was made with."""
    return group._get_backend(device).options._timeout.total_seconds()


def exchange(send: Tensor, group: ProcessGroup, name: str) -> Tensor:
    """send [W, n], one row for each rank of the group -> what each rank sends here, [W, n]."""
    ones = [1] * group.size()
    return start_all_to_all(send, ones, ones, group, name).wait()


def _count(group: ProcessGroup, send: list[int], row_bytes: int) -> None:
    me = group.rank()
    for peer, rows in enumerate(send):
        if peer != me:
            _sent[group.group_desc, peer] += rows * row_bytes


def clock_offset(group: ProcessGroup | None) -> float:
    """What to add to this rank's perf_counter readings to have them on the clock of rank 0 of `group`. Collective."""
    readings = []
    machine = _machine()
    for _ in range(CLOCK_ROUNDS):
        gather(None, group)
        readings.append(time.perf_counter())
    first = gather((machine, readings), group)[0]
    if first[0] == machine:
        return 0.0
    return statistics.median(theirs - mine for theirs, mine in zip(first[1], readings, strict=True))


def _machine() -> str:
    """What tells this machine, since its last start, from any other: perf_counter counts from that start on Linux."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else f"{os.uname().nodename}"
