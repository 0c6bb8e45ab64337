"""The collectives that the framework uses: their waits are timed, their bytes counted, their failures explained.

What a process spends waiting here is exposed communication. Everything accepts `group=None` as the group of one, which
does nothing: callers need no `if`. FP8 is sent as bytes, because gloo knows no float8. Every collective is reported to
the hang detector (`hang.py`), so that a failed one names the rank that is missing.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fp8moe.parallel import hang, place
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


def all_reduce_in_message(tensor: Tensor, group: ProcessGroup | None, name: str) -> None:
    """Sum in place over `group`, within a message: what it waits for is not exposed communication."""
    if group is not None:
        with hang.collective(group, f"all_reduce ({name})"):
            dist.all_reduce(tensor, group=group)


def gather(value: Any, group: ProcessGroup | None) -> list[Any]:
    """Every rank's `value`, in order of rank of `group`; by pickle, on the host: for start and end of a run."""
    if group is None:
        return [value]
    values: list[Any] = [None] * group.size()
    with waiting(), hang.collective(group, "all_gather (objects)"):
        dist.all_gather_object(values, value, group=group)
    return values


class PendingAllToAll:
    """An all-to-all in flight; it owns its buffers. timeout: seconds, where its parts do not keep the group's own."""

    def __init__(
        self,
        out: Tensor,
        rows: Tensor,
        works: list[Any],
        pending: hang.PendingCollective,
        *,
        timeout: float | None = None,
    ) -> None:
        self._out, self._rows, self._works, self._pending, self._timeout = out, rows, works, pending, timeout

    def wait(self) -> Tensor:
        """[sum(receive), ...] in order of source. On a GPU the current stream waits, not the host."""
        with self._pending:
            if self._timeout is None:
                for work in self._works:
                    work.wait()
            else:
                _wait(self._works, self._timeout)
        return self._out


def start_all_to_all(
    rows: Tensor, send: list[int], receive: list[int], group: ProcessGroup, name: str
) -> PendingAllToAll:
    """Send rows [sum(send), ...] of any strides, in order of destination; `name` says what they are, for errors."""
    rows = rows.contiguous()
    _count(group, send, rows.element_size() * rows[0].numel() if len(rows) else 0)
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    pending = hang.collective(group, f"all_to_all ({name})")
    with pending:
        if rows.device.type == "cpu":
            works = _by_pairs(out.split(receive), rows.split(send), group)
            return PendingAllToAll(out, rows, works, pending, timeout=_timeout_of(group, rows.device))
        work = dist.all_to_all_single(out, rows, receive, send, group=group, async_op=True)
    return PendingAllToAll(out, rows, [work], pending)


def _by_pairs(parts: Sequence[Tensor], send: Sequence[Tensor], group: ProcessGroup) -> list[Any]:
    """The all-to-all by pairs, for gloo: posts all receives, then all sends -> the works to wait for.

    Gloo tells a sender that its receiver is ready in the byte stream that carries the receiver's own rows, and its own
    all-to-all posts each receive behind the send. Where two ranks start a moment apart, the rows of the first then wait
    until those of the second have passed: the link is used in one direction at a time, half as fast.
    """
    me, size = group.rank(), group.size()
    peers = [(me + i) % size for i in range(1, size)]  # neighbour first: not all to one rank
    works = [dist.irecv(parts[i], group=group, group_src=i) for i in peers if len(parts[i])]
    works += [dist.isend(send[i], group=group, group_dst=i) for i in peers if len(send[i])]
    parts[me].copy_(send[me])
    return works


def _timeout_of(group: ProcessGroup, device: torch.device) -> float:
    """The group's present timeout in seconds; gloo's receives would keep the one that the group was made with."""
    return group._get_backend(device).options._timeout.total_seconds()


class PendingBroadcast:
    """A broadcast in flight; it owns its buffer."""

    def __init__(self, buffer: Tensor, work: Any, pending: hang.PendingCollective) -> None:
        self._buffer, self._work, self._pending = buffer, work, pending

    @property
    def is_done(self) -> bool:
        done: bool = self._work.is_completed()
        return done

    def wait(self) -> Tensor:
        """The root's values. On a GPU the current stream waits, not the host."""
        with waiting(), self._pending:
            self._work.wait()
        return self._buffer


def start_broadcast(buffer: Tensor, root: int, group: ProcessGroup, name: str) -> PendingBroadcast:
    """Send what global rank `root` has in `buffer` to all of `group`, in place; the root need not wait for it."""
    pending = hang.collective(group, f"broadcast ({name})")
    with pending:
        work = dist.broadcast(buffer, root, group=group, async_op=True)
    return PendingBroadcast(buffer, work, pending)


Parts = Sequence[tuple[int, int]]  # by rank of a group: (start, stop) in a flat buffer


def reduce_scatter(flat: Tensor, parts: Parts, group: ProcessGroup, name: str) -> None:
    """Sum flat [n] over `group`, each part on its own rank, in place: outside its part a rank keeps its own values.

    On a CPU the summands are added in the order of the ranks, so that a sum depends on nothing else, and each rank
    sends n (W-1)/W values; gloo's own reduction, an all-reduce, sends twice as many. For messages: on a CPU it waits on
    the host.
    """
    me = group.rank()
    mine = flat[slice(*parts[me])]
    pieces = [flat[start:stop] for start, stop in parts]
    _count(group, [len(piece) for piece in pieces], flat.element_size())
    with hang.collective(group, f"reduce_scatter ({name})"):
        if flat.device.type == "cpu":
            arrived = flat.new_empty(group.size(), len(mine))
            _wait(_by_pairs(arrived.unbind(), pieces, group), _timeout_of(group, flat.device))
            mine.copy_(arrived[0])
            for summand in arrived[1:]:
                mine.add_(summand)
        elif (whole := _in_order(flat, parts)) is not None:
            dist.reduce_scatter_tensor(mine, whole, group=group)
        else:
            dist.reduce_scatter(mine, pieces, group=group)


def all_gather(flat: Tensor, parts: Parts, group: ProcessGroup, name: str) -> None:
    """Fill the parts of flat [n] that other ranks of `group` hold, each from its rank, in place, within a message."""
    mine = flat[slice(*parts[group.rank()])]
    pieces = [flat[start:stop] for start, stop in parts]
    _count(group, [len(mine)] * group.size(), flat.element_size())
    with hang.collective(group, f"all_gather ({name})"):
        if flat.device.type == "cpu":
            _wait(_by_pairs(pieces, [mine] * group.size(), group), _timeout_of(group, flat.device))
        elif (whole := _in_order(flat, parts)) is not None:
            dist.all_gather_into_tensor(whole, mine, group=group)
        else:
            dist.all_gather(pieces, mine, group=group)


def _in_order(flat: Tensor, parts: Parts) -> Tensor | None:
    """The values of all parts where these are of one size and follow each other in order of rank; None otherwise."""
    start, size = parts[0][0], parts[0][1] - parts[0][0]
    is_even = all(part == (start + i * size, start + (i + 1) * size) for i, part in enumerate(parts))
    return flat[start : start + size * len(parts)] if is_even else None


def _wait(works: Sequence[Any], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    for work in works:
        work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))


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
    """What to add to this rank's perf_counter readings to have them on the clock of rank 0 of `group`. Collective.

    Ranks of one machine share a clock: perf_counter counts from the machine's start on Linux.
    """
    readings = []
    machine = place.machine_id()
    for _ in range(CLOCK_ROUNDS):
        gather(None, group)
        readings.append(time.perf_counter())
    first = gather((machine, readings), group)[0]
    if first[0] == machine:
        return 0.0
    return statistics.median(theirs - mine for theirs, mine in zip(first[1], readings, strict=True))
