"""Hops without processes: which rows go to which peer, along a route and back, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fp8moe.kernels.permute import plan_rows
from fp8moe.parallel.dispatch import hops
from fp8moe.parallel.dispatch.hops import Hop, HopGroup, Route, Splits, plan_hop
from fp8moe.parallel.dispatch.payload import Columns


class Group:
    def __init__(self, size: int, rank: int) -> None:
        self.size, self.rank = lambda: size, lambda: rank


def peers(size: int, experts_per_peer: int, rank: int = 0) -> HopGroup:
    return HopGroup(Group(size, rank), experts_per_peer)  # type: ignore[arg-type]


# Two experts a peer, three peers: experts 0 1 | 2 3 | 4 5; -1 is an expert that another node holds.
IDS = torch.tensor([[0, 1, 4], [3, -1, 2], [5, 0, 3], [-1, -1, -1]])


def test_a_hop_of_exact_splits_sends_every_row() -> None:
    hop = plan_hop(IDS, peers(3, 2), Splits([2, 2, 2], [0, 0, 0]))
    assert hop.row_map.source_R.tolist() == [0, 2, 1, 2, 0, 2]
    assert hop.row_map.tokens_per_expert.tolist() == [2, 2, 2] and hop.row_map.group_offsets.tolist() == [0, 2, 4, 6]


def test_a_hop_of_fixed_splits_has_the_same_room_for_every_peer() -> None:
    hop = plan_hop(IDS, peers(3, 2), Splits([3] * 3, [3] * 3, fixed=True))
    assert hop.row_map.source_R.tolist() == [0, 2, -1, 1, 2, -1, 0, 2, -1]
    assert hop.row_map.tokens_per_expert.tolist() == [2, 2, 2]


def test_a_hop_inside_a_node_leads_to_the_experts_of_this_node() -> None:
    hop = plan_hop(IDS, HopGroup(Group(2, 0), 1, first=2), Splits([1, 2], [0, 0]))  # type: ignore[arg-type]
    assert hop.row_map.source_R.tolist() == [1, 1, 2]  # expert 2 | 3


class Sent:
    """An all-to-all whose every row comes back to where it started."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def wait(self) -> Tensor:
        return self.rows


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []

    def start(rows: Tensor, send: list[int], receive: list[int], group: Any, name: str) -> Sent:
        calls.append((name, send, receive, group))
        return Sent(rows)

    monkeypatch.setattr(hops, "start_all_to_all", start)
    return calls


def route(tokens: list[int]) -> Route:
    """Two hops of chunks of `tokens` tokens: every token to two nodes, and there to two ranks."""
    across, inside = peers(2, 1), peers(2, 1)
    chunks = []
    for count in tokens:
        first = plan_hop(torch.arange(2).expand(count, 2), across, Splits([count] * 2, [count] * 2))
        second = plan_hop(torch.arange(2).expand(2 * count, 2), inside, Splits([2 * count] * 2, [2 * count] * 2))
        chunks.append([first, second])
    return Route(chunks, tokens, [4 * count for count in tokens])


@pytest.mark.parametrize("tokens", [[3], [2, 1], [1, 0, 2]])
def test_a_route_crosses_each_hop_chunk_by_chunk_and_returns_sums(sent: list[Any], tokens: list[int]) -> None:
    made, chunks = route(tokens), len(tokens)
    body = torch.arange(48, dtype=torch.uint8).view(3, 16)  # 16 bytes: a row of a message
    arrived = made.send(body, "combine backward")
    assert [call[0] for call in sent] == ["combine backward"] * chunks + ["combine backward, hop 2"] * chunks
    assert [call[1] for call in sent[:chunks]] == [[count, count] for count in tokens]
    expected = torch.cat([part.repeat(4, 1) for part in body.split(tokens)])
    assert torch.equal(arrived, expected)
    del sent[:]
    parts = [torch.arange(24.0).view(12, 2), torch.arange(12, dtype=torch.bfloat16)[:, None]]
    columns = Columns(((torch.float32, 2), (torch.bfloat16, 1)))
    message = columns.empty(12, torch.device("cpu"))
    for column, part in zip(columns.of(message), parts, strict=True):
        column.copy_(part)
    sums = made.send_back(message, columns, "combine")
    assert [call[0] for call in sent] == ["combine, hop 2"] * chunks + ["combine"] * chunks
    for total, part in zip(sums, parts, strict=True):
        pieces = part.split([4 * count for count in tokens])
        assert total.dtype == part.dtype
        assert torch.equal(total, torch.cat([sum(piece.chunk(4)) for piece in pieces if len(piece)]))


def test_a_hop_returns_along_its_splits_reversed(sent: list[Any]) -> None:
    group = peers(2, 1)
    hop = Hop(group, plan_rows(torch.zeros(3, 1, dtype=torch.int64), 2, align=1), Splits([3, 0], [1, 2]))
    hop.send(torch.zeros(3, 1), "there")
    hop.send_back(torch.zeros(3, 1), "back")
    assert sent == [("there", [3, 0], [1, 2], group.group), ("back", [1, 2], [3, 0], group.group)]
