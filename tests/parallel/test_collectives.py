"""Collectives: what arrives, what is posted first, whose timeout holds, what is counted, and the offset of clocks."""

from __future__ import annotations

import time
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fp8moe.parallel import collectives, place
from fp8moe.parallel.collectives import (
    Parts,
    all_gather,
    all_reduce,
    clock_offset,
    exchange,
    gather,
    reduce_scatter,
    sent_bytes,
    start_all_to_all,
)
from tests.parallel.ranks import run_ranks

WORLD = 4
ROWS = torch.tensor([[2, 0, 3, 1], [1, 1, 0, 0], [0, 4, 0, 2], [0, 0, 0, 0]])  # from rank (row) to rank (column)


def pairwise() -> dict[str, Any]:
    group, posted = dist.group.WORLD, []
    assert group is not None
    irecv, isend = dist.irecv, dist.isend
    dist.irecv = lambda *a, **k: (posted.append("receive"), irecv(*a, **k))[1]  # type: ignore[assignment]
    dist.isend = lambda *a, **k: (posted.append("send"), isend(*a, **k))[1]  # type: ignore[assignment]
    me = group.rank()
    send, receive = ROWS[me].tolist(), ROWS[:, me].tolist()
    table = [[10 * me + peer, i] for peer, n in enumerate(send) for i in range(n)]
    rows = torch.tensor(table, dtype=torch.int64).view(-1, 2)
    sent_bytes()
    got = start_all_to_all(rows, send, receive, group, "rows").wait()
    return {"rows": got.tolist(), "posted": posted, "sent": sum(sent_bytes().values())}


def test_rows_arrive_in_order_of_source_and_receives_are_posted_before_sends() -> None:
    for me, answer in enumerate(run_ranks(pairwise, WORLD)):
        assert answer["rows"] == [[10 * peer + me, i] for peer in range(WORLD) for i in range(int(ROWS[peer, me]))]
        others = [peer for peer in range(WORLD) if peer != me]
        receives, sends = int((ROWS[others, me] > 0).sum()), int((ROWS[me, others] > 0).sum())
        assert answer["posted"] == ["receive"] * receives + ["send"] * sends
        assert answer["sent"] == 16 * int(ROWS[me, others].sum())


EVEN, UNEVEN = ((0, 3), (3, 6), (6, 9), (9, 12)), ((7, 12), (0, 5), (5, 5), (5, 7))  # parts of 12 values by rank


def values_of(rank: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(16, generator=torch.Generator().manual_seed(rank)).to(dtype)


def scattered(parts: Parts, dtype: torch.dtype) -> dict[str, Any]:
    """This rank's part of the sum, and all parts of each rank's own; four values behind the parts are nobody's."""
    group = dist.group.WORLD
    assert group is not None
    me = group.rank()
    summed, gathered = values_of(me, dtype), torch.full((16,), float("nan"), dtype=dtype)
    part = slice(*parts[me])
    gathered[part] = summed[part]
    sent_bytes()
    reduce_scatter(summed, parts, group, "sums")
    bytes_of_sums = sum(sent_bytes().values())
    all_gather(gathered, parts, group, "parts")
    return {
        "sums": summed.clone(), "parts": gathered.clone(), "sent": (bytes_of_sums, sum(sent_bytes().values()))
    }  # fmt: skip


@pytest.mark.parametrize("parts", [EVEN, UNEVEN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_summed_in_order_of_rank_and_gathered(parts: Parts, dtype: torch.dtype) -> None:
    answers = run_ranks(scattered, WORLD, parts, dtype)
    of_rank = [values_of(rank, dtype) for rank in range(WORLD)]
    expected = of_rank[0] + of_rank[1] + of_rank[2] + of_rank[3]
    for me, answer in enumerate(answers):
        start, stop = parts[me]
        own = torch.cat([of_rank[me][:start], expected[start:stop], of_rank[me][stop:]])
        assert torch.equal(answer["sums"], own)
        for rank, (start, stop) in enumerate(parts):
            assert torch.equal(answer["parts"][start:stop], of_rank[rank][start:stop])
        assert answer["parts"][12:].isnan().all()
        mine = parts[me][1] - parts[me][0]
        assert answer["sent"] == ((12 - mine) * dtype.itemsize, 3 * mine * dtype.itemsize)


def lowered() -> float:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=60), group_desc="pair")
    rows = torch.ones(2, 1)
    start_all_to_all(rows, [1, 1], [1, 1], group, "first").wait()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), group)
    if dist.get_rank() == 1:
        time.sleep(30)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="Timed out waiting"):
        start_all_to_all(rows, [1, 1], [1, 1], group, "second").wait()
    return time.monotonic() - start


def test_a_timeout_that_was_lowered_after_start_up_holds() -> None:
    assert 0.5 < run_ranks(lowered, 2, absent=(1,))[0] < 10


def offsets(behind: list[float], machines: list[str]) -> float:
    """On each rank: its offset, if its clock were `behind` by that much."""
    rank = dist.get_rank()
    real = time.perf_counter
    place.machine_id = lambda: machines[rank]
    collectives.time = type("Clock", (), {"perf_counter": staticmethod(lambda: real() - behind[rank])})  # type: ignore[assignment]
    return clock_offset(dist.group.WORLD)


def test_clocks_of_other_machines_are_set_by_that_of_rank_0() -> None:
    found: list[Any] = run_ranks(offsets, 3, [5.0, 5.0, 105.0], ["a", "a", "b"])
    assert found[:2] == [0.0, 0.0]
    assert found[2] == pytest.approx(100.0, abs=0.5)
    assert clock_offset(None) == 0.0


def strided() -> list[list[float]]:
    group = dist.group.WORLD
    assert group is not None
    rows = torch.arange(6.0).view(2, 3).T + 100 * group.rank()  # [3, 2], transposed: one row stays, two go
    send, receive = ([1, 2], [1, 2]) if group.rank() == 0 else ([2, 1], [2, 1])
    return start_all_to_all(rows, send, receive, group, "rows").wait().tolist()


def test_transposed_rows_arrive_right() -> None:
    rows = [(torch.arange(6.0).view(2, 3).T + 100 * rank).tolist() for rank in range(2)]
    assert run_ranks(strided, 2) == [rows[0][:1] + rows[1][:2], rows[0][1:] + rows[1][2:]]


def by_row() -> tuple[list[list[int]], list[Any], dict[tuple[str, int], int], dict[tuple[str, int], int]]:
    group = dist.new_group([0, 1, 2], group_desc="three")
    me = group.rank()
    sent_bytes()
    got = exchange(torch.tensor([[10 * me + peer, -1] for peer in range(3)]), group, "numbers")
    values = gather({"rank": me}, group)
    total = all_reduce(torch.tensor([me]), group, dist.ReduceOp.MAX)
    assert total.item() == 2 and all_reduce(torch.tensor([me]), group).item() == 3
    return got.tolist(), values, sent_bytes(), sent_bytes()


def test_one_row_to_every_rank_and_what_was_sent_is_counted_by_peer() -> None:
    for me, (got, values, sent, later) in enumerate(run_ranks(by_row, 3)):
        assert got == [[10 * peer + me, -1] for peer in range(3)]
        assert values == [{"rank": rank} for rank in range(3)]
        assert sent == {("three", peer): 16 for peer in range(3) if peer != me}
        assert later == {}


def test_a_group_of_one_does_nothing() -> None:
    tensor = torch.ones(2)
    assert all_reduce(tensor, None) is tensor and tensor.tolist() == [1, 1]
    assert gather("mine", None) == ["mine"]


class Work:
    """What a back end gives: it notes with which limit it was waited for."""

    def __init__(self, limits: list[Any], seconds: float = 0.0) -> None:
        self.limits, self.seconds = limits, seconds

    def wait(self, timeout: timedelta | None = None) -> None:
        time.sleep(self.seconds)
        self.limits.append(None if timeout is None else timeout.total_seconds())


def test_all_parts_of_a_message_share_one_timeout() -> None:
    limits: list[Any] = []
    works = [Work(limits, 0.3), Work(limits, 0.0)]
    pending = collectives.PendingAllToAll(torch.ones(1), torch.ones(1), works, nullcontext(), timeout=0.2)  # type: ignore[arg-type]
    assert pending.wait().tolist() == [1]
    assert 0.1 < limits[0] <= 0.2 and limits[1] == 0.001  # the first took all of it; the second is only asked
    collectives.PendingAllToAll(torch.ones(1), torch.ones(1), [Work(limits)], nullcontext()).wait()  # type: ignore
    assert limits[2] is None
