"""The all-to-all by pairs (what arrives, what is posted first, whose timeout holds), and the offset of clocks."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fp8moe.parallel import collectives, hang
from fp8moe.parallel.collectives import clock_offset, sent_bytes, start_all_to_all
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
    hang.machine_id = lambda: machines[rank]
    collectives.time = type("Clock", (), {"perf_counter": staticmethod(lambda: real() - behind[rank])})  # type: ignore[assignment]
    return clock_offset(dist.group.WORLD)


def test_clocks_of_other_machines_are_set_by_that_of_rank_0() -> None:
    found: list[Any] = run_ranks(offsets, 3, [5.0, 5.0, 105.0], ["a", "a", "b"])
    assert found[:2] == [0.0, 0.0]
    assert found[2] == pytest.approx(100.0, abs=0.5)
    assert clock_offset(None) == 0.0
