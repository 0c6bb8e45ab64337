"""Hops without processes: which rows go to which peer, what they carry, and in what order they lie, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fp8moe.kernels.permute import permute, plan_rows
from fp8moe.parallel.dispatch import hops
from fp8moe.parallel.dispatch.hops import (
    Hop,
    HopGroup,
    Payload,
    Route,
    Splits,
    destinations,
    in_order,
    pack_payload,
    plan_hop,
    unpack_payload,
)


class Group:
    def __init__(self, size: int, rank: int) -> None:
        self.size, self.rank = lambda: size, lambda: rank


def peers(size: int, experts_per_peer: int, rank: int = 0) -> HopGroup:
    return HopGroup(Group(size, rank), experts_per_peer)  # type: ignore[arg-type]


# Two experts a peer, three peers: experts 0 1 | 2 3 | 4 5; -1 is an expert that another node holds.
IDS = torch.tensor([[0, 1, 4], [3, -1, 2], [5, 0, 3], [-1, -1, -1]])


def test_a_token_goes_once_to_each_peer_in_ascending_order() -> None:
    assert destinations(IDS, peers(3, 2)).tolist() == [[0, 2, -1], [1, -1, -1], [0, 1, 2], [-1, -1, -1]]
    assert destinations(IDS, peers(2, 3)).tolist() == [[0, 1], [0, 1], [0, 1], [-1, -1]]  # fewer peers than experts


def test_exact_splits_send_every_row() -> None:
    hop = plan_hop(IDS, peers(3, 2), Splits([2, 2, 2], [0, 0, 0]))
    assert hop.row_map.source_R.tolist() == [0, 2, 1, 2, 0, 2]
    assert hop.row_map.tokens_per_expert.tolist() == [2, 2, 2] and hop.row_map.group_offsets.tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize(
    "room, source",
    [
        (3, [0, 2, -1, 1, 2, -1, 0, 2, -1]),  # a row of padding for each peer
        (2, [0, 2, 1, 2, 0, 2]),
        (1, [0, 1, 0]),  # each peer's second row is not sent
    ],
)
def test_fixed_splits_pad_or_cut_each_peers_rows_and_count_them_all(room: int, source: list[int]) -> None:
    hop = plan_hop(IDS, peers(3, 2), Splits([room] * 3, [room] * 3, fixed=True))
    assert hop.row_map.source_R.tolist() == source
    assert (hop.row_map.slot_R >= 0).tolist() == [row >= 0 for row in source]
    assert hop.row_map.group_offsets.tolist() == [0, room, 2 * room, 3 * room]
    assert hop.row_map.tokens_per_expert.tolist() == [2, 2, 2]


def payload(tokens: int = 4) -> Payload:
    body = torch.arange(tokens, dtype=torch.uint8)[:, None] + torch.tensor([[10, 20]], dtype=torch.uint8)
    return Payload(body, IDS[:tokens], torch.arange(1.0, 13.0).view(4, 3)[:tokens])


@pytest.mark.parametrize("fixed", [False, True])
def test_a_peer_picks_the_ids_that_it_holds_from_a_row(fixed: bool) -> None:
    hop = plan_hop(IDS, peers(3, 2), Splits([2, 2, 2] if not fixed else [3] * 3, [0] * 3, fixed=fixed))
    extra = torch.arange(100, 104, dtype=torch.int16)[:, None]
    rows = pack_payload(payload(), hop, extra)
    room = len(rows) // 3
    arrived = [unpack_payload(rows[room * p : room * (p + 1)], 2, 3, peers(3, 2, p)) for p in range(3)]
    got = Payload(*(torch.cat([getattr(one, name) for one, _ in arrived]) for name in ("body", "ids_TK", "weights_TK")))
    rest = torch.cat([extra for _, extra in arrived])
    real = hop.row_map.slot_R >= 0
    source = hop.row_map.source_R[real]
    assert torch.equal(got.body[real], payload().body[source])
    assert got.ids_TK[real].tolist() == [[0, 1, -1], [-1, 0, -1], [1, -1, 0], [-1, -1, 1], [-1, -1, 0], [1, -1, -1]]
    assert torch.equal(got.weights_TK[real], payload().weights_TK[source])
    assert rest[real].contiguous().view(torch.int16)[:, 0].tolist() == [100 + int(i) for i in source]
    assert (got.ids_TK[~real] == -1).all()  # padding holds no token
    assert unpack_payload(pack_payload(payload(), hop), 2, 3, peers(3, 2))[1].shape[1] == 0


def test_the_largest_id_travels() -> None:
    last = 2**15 - 1
    ids = torch.tensor([[last, 0]])
    hop = plan_hop(ids, peers(2, 2**14), Splits([1, 1], [0, 0]))
    rows = pack_payload(Payload(torch.zeros(1, 2, dtype=torch.uint8), ids, torch.ones(1, 2)), hop)
    for rank, here in enumerate(([-1, 0], [2**14 - 1, -1])):
        assert unpack_payload(rows[rank : rank + 1], 2, 2, peers(2, 2**14, rank))[0].ids_TK.tolist() == [here]


def test_a_fixed_message_of_no_tokens_is_all_padding() -> None:
    hop = plan_hop(IDS[:0], peers(3, 2), Splits([2] * 3, [2] * 3, fixed=True))
    got, _ = unpack_payload(pack_payload(payload(0), hop), 2, 3, peers(3, 2))
    assert got.body.shape == (6, 2) and (got.ids_TK == -1).all()


def test_rows_in_another_order_make_the_same_groups() -> None:
    """Rows of the global order lie as `order` says; the map for where they lie gathers the same rows."""
    ids, x = torch.tensor([[0, 1], [1, -1], [-1, 0], [1, 0]]), torch.arange(4.0)[:, None]
    order = torch.tensor([2, 0, 3, 1])  # row n of the global order is row order[n] as it lies
    lying = torch.empty_like(x)
    lying[order] = x
    row_map = plan_rows(ids, 2, align=4)
    moved = in_order(row_map, order)
    assert torch.equal(permute(lying, moved), permute(x, row_map))
    assert torch.equal(moved.slot_R % 2, row_map.slot_R.clamp(min=0) % 2 * (row_map.slot_R >= 0) + (row_map.slot_R < 0))
    assert torch.equal(moved.group_offsets, row_map.group_offsets) and moved.num_rows == row_map.num_rows
    empty = in_order(plan_rows(ids[:0], 2, align=4, room=4), order[:0])
    assert empty.source_R.tolist() == [-1] * 4 and empty.slot_R.tolist() == [-1] * 4


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
    body = torch.arange(6, dtype=torch.uint8).view(3, 2)
    arrived = made.send(body, "combine backward")
    assert [call[0] for call in sent] == ["combine backward"] * chunks + ["combine backward, hop 2"] * chunks
    assert [call[1] for call in sent[:chunks]] == [[count, count] for count in tokens]
    expected = torch.cat([part.repeat(4, 1) for part in body.split(tokens)])
    assert torch.equal(arrived, expected)
    del sent[:]
    parts = [torch.arange(24.0).view(12, 2), torch.arange(12, dtype=torch.bfloat16)[:, None]]
    sums = made.send_back(parts, "combine")
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
