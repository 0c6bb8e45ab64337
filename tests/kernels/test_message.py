"""Messages between ranks against plain loops: who gets which row, what a row carries, and what bad input is told."""

import struct

import pytest
import torch

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.message import MessageLayout, pack_message, plan_message, unpack_message
from fp8moe.kernels.message_layout import exponents, scales
from fp8moe.kernels.permute import permute, plan_rows, unpermute
from fp8moe.kernels.quantize import quantize_rows
from fp8moe.kernels.row_map import invert
from tests.kernels.row_maps import PARTS, random_ids, record_waits

# Two experts a peer, three peers: experts 0 1 | 2 3 | 4 5; -1 is an expert that another node holds.
IDS = torch.tensor([[0, 1, 4], [3, -1, 2], [5, 0, 3], [-1, -1, -1]])
WEIGHTS = torch.arange(1.0, 13.0).view(4, 3)
ROWS = {"bf16": 576, "fp32": 3, "fp8": 144}


def rows_of(kind: str, n: int = 4):
    x = torch.randn(n, ROWS[kind])
    return quantize_rows(x, power_of_two=True) if kind == "fp8" else x.bfloat16() if kind == "bf16" else x


def peers_by_loop(ids: list[list[int]], peers: int, span: int, first: int) -> list[list[int]]:
    """The peers of each row, ascending."""
    return [sorted({(i - first) // span for i in row if 0 <= i - first < peers * span}) for row in ids]


@pytest.mark.parametrize("first", [0, 6])
@pytest.mark.parametrize(
    "n, topk, peers, span", [(37, 4, 3, 4), (20, 3, 6, 2), (5, 4, 2, 6), (1, 1, 1, 8), (0, 2, 3, 2)]
)
def test_a_row_goes_once_to_each_peer_in_ascending_order(n: int, topk: int, peers: int, span: int, first: int) -> None:
    ids = random_ids(n, topk, peers * span + 4, 0.3)
    expected = peers_by_loop(ids.tolist(), peers, span, first)
    sources = [[t for t, to in enumerate(expected) if p in to] for p in range(peers)]
    row_map = plan_message(ids, peers, span, room=sum(map(len, sources)), first=first)
    assert row_map.source_R.tolist() == [t for rows in sources for t in rows]
    assert row_map.tokens_per_expert.tolist() == [len(rows) for rows in sources]
    assert row_map.topk == min(topk, peers)
    slots = [t * row_map.topk + expected[t].index(p) for p in range(peers) for t in sources[p]]
    assert row_map.slot_R.tolist() == slots and torch.equal(
        invert(row_map.slot_R, n * row_map.topk), row_map.row_of_slot
    )


@pytest.mark.parametrize(
    "room, source",
    [
        (9, [0, 2, -1, 1, 2, -1, 0, 2, -1]),  # a row of padding for each peer
        (6, [0, 2, 1, 2, 0, 2]),
        (3, [0, 1, 0]),  # each peer's second row is not sent
    ],
)
def test_fixed_messages_pad_or_cut_each_peers_rows_and_count_them_all(room: int, source: list[int]) -> None:
    row_map = plan_message(IDS, 3, 2, room=room, fixed=True)
    assert row_map.source_R.tolist() == source
    assert (row_map.slot_R >= 0).tolist() == [row >= 0 for row in source]
    assert row_map.group_offsets.tolist() == [0, room // 3, 2 * room // 3, room]
    assert row_map.tokens_per_expert.tolist() == [2, 2, 2]
    assert torch.equal(invert(row_map.slot_R, 12), row_map.row_of_slot)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("sender", [0, 5, 2**15 - 1])
def test_a_row_carries_its_values_ids_weights_and_sender(kind: str, sender: int) -> None:
    rows, row_map = rows_of(kind), plan_message(IDS, 3, 2, room=9, fixed=True)
    layout = MessageLayout.of(rows, 3)
    message = pack_message(rows, row_map, IDS, WEIGHTS, sender=sender)
    assert message.shape == (9, layout.row_bytes) and layout.row_bytes % 16 == 0
    for row, source in zip(message.tolist(), row_map.source_R.tolist(), strict=True):
        packed = bytes(row)
        if source < 0:
            assert not any(packed)
            continue
        body = rows.data[source] if isinstance(rows, Fp8Tensor) else rows[source]
        assert packed[: layout.body] == bytes(body.contiguous().view(torch.uint8).tolist())
        assert list(struct.unpack("<3f", packed[layout.weights : layout.ids])) == WEIGHTS[source].tolist()
        assert [~i for i in struct.unpack("<3h", packed[layout.ids : layout.sender])] == IDS[source].tolist()
        assert ~struct.unpack("<h", packed[layout.sender : layout.sender + 2])[0] == sender
        if isinstance(rows, Fp8Tensor):
            sent = [2.0 ** (e - 127) for e in packed[layout.exponents : layout.exponents + layout.num_tiles]]
            assert sent == rows.scale[source].tolist()
    real = row_map.source_R >= 0
    assert torch.equal(~layout.ids_of(message)[real], IDS[row_map.source_R[real]].to(torch.int16))
    assert (~layout.sender_of(message)[~real] == -1).all() and (~layout.ids_of(message)[~real] == -1).all()


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("fixed", [False, True])
def test_experts_get_the_rows_and_weights_that_were_sent(kind: str, fixed: bool) -> None:
    """Three peers, each of which sends to all: what each unpacks is what a permutation of all rows gives it."""
    sent = [(rows_of(kind, 4 + p), random_ids(4 + p, 3, 6, 0.2), torch.rand(4 + p, 3)) for p in range(3)]
    layout, parts = MessageLayout.of(sent[0][0], 3), []
    for number, (rows, ids, weights) in enumerate(sent):
        exact = [sum(p in to for to in peers_by_loop(ids.tolist(), 3, 2, 0)) for p in range(3)]
        row_map = plan_message(ids, 3, 2, room=18 if fixed else sum(exact), fixed=fixed)
        message = pack_message(rows, row_map, ids, weights, sender=number)
        parts.append(message.split([6] * 3 if fixed else exact))
    ids, weights = (torch.cat([one[n] for one in sent]) for n in (1, 2))
    for peer in range(3):
        arrived = torch.cat([parts[number][peer] for number in (2, 0, 1)])  # in another order than their senders'
        order = plan_rows(layout.sender_of(arrived), 4, align=1, room=len(arrived), first=-1).source_R
        row_map = plan_rows(layout.ids_of(arrived), 2, align=4, room=40, first=2 * peer, order=order)
        got, got_weights = unpack_message(arrived, row_map, layout)
        whole = plan_rows(ids, 2, align=4, room=40, first=2 * peer)
        everything = [one[0] for one in sent]
        expected = permute(joined(everything), whole)
        assert torch.equal(row_map.group_offsets, whole.group_offsets)
        assert torch.equal(got_weights, permute(weights.flatten(), whole.of_slots()))
        for ours, theirs in zip(tensors(got), tensors(expected), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(invert(row_map.slot_R, len(arrived) * 3), row_map.row_of_slot)


def joined(rows):
    if isinstance(rows[0], Fp8Tensor):
        return Fp8Tensor(torch.cat([r.data.view(torch.uint8) for r in rows]).view(rows[0].data.dtype),
                         torch.cat([r.scale for r in rows]))  # fmt: skip
    return torch.cat(rows)


def tensors(rows):
    return [rows.data.view(torch.uint8), rows.scale] if isinstance(rows, Fp8Tensor) else [rows]


@pytest.mark.parametrize("kind", ROWS)
def test_rows_travel_without_ids_too(kind: str) -> None:
    rows, row_map = rows_of(kind), plan_rows(torch.tensor([[2], [0], [-1], [1]]), 3, align=2)
    message = pack_message(rows, row_map)
    layout = MessageLayout.of(rows)
    assert (layout.ids, layout.exponents) == (layout.weights, layout.weights)
    back = plan_rows(torch.zeros(len(message), 1, dtype=torch.int64), 1, align=1)
    got, weights = unpack_message(message, back, layout)
    assert weights is None
    real, source = row_map.source_R >= 0, row_map.source_R[row_map.source_R >= 0]
    for ours, theirs in zip(tensors(got), tensors(rows), strict=True):
        assert torch.equal(ours[real], theirs[source])


def test_every_power_of_two_and_what_is_not_finite() -> None:
    powers = torch.ldexp(torch.ones(254), torch.arange(-126, 128))
    assert torch.equal(scales(exponents(powers)), powers)
    odd = torch.tensor([float("inf"), float("nan")])
    assert scales(exponents(odd)).tolist()[0] == float("inf")
    assert scales(exponents(odd)).isnan().tolist() == [False, True]


@pytest.mark.parametrize("scale", [3.0, -2.0, 1.5])
def test_other_scales_are_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="quantize with power_of_two=True"):
        exponents(torch.tensor([1.0, scale]))


def test_rows_taken_in_an_order_make_the_groups_of_that_order() -> None:
    ids = random_ids(30, 3, 6, 0.2)
    order = torch.randperm(30)
    moved, plan = plan_rows(ids, 6, align=4, order=order), plan_rows(ids[order], 6, align=4)
    x = torch.arange(30.0)[:, None]
    assert torch.equal(permute(x, moved), permute(x[order], plan))
    assert torch.equal(moved.slot_R % 3, plan.slot_R % 3) and torch.equal(moved.group_offsets, plan.group_offsets)
    y = torch.randn(len(plan.slot_R), 5)
    assert torch.equal(unpermute(y, moved)[order], unpermute(y, plan))
    empty = plan_rows(ids[:0], 6, align=4, room=4, order=order[:0])
    assert empty.source_R.tolist() == [-1] * 4 and empty.slot_R.tolist() == [-1] * 4


def test_ids_of_a_message_and_ids_that_others_have() -> None:
    ids = random_ids(30, 3, 12, 0.2)
    shifted = ids.masked_fill((ids < 4) | (ids >= 8), 3) - 4  # -1 where none of experts 4 to 7 is asked for
    expected = plan_rows(shifted, 4, align=8)
    for given in (ids, ~ids.to(torch.int16)):
        row_map = plan_rows(given, 4, align=8, first=4)
        assert all(torch.equal(getattr(row_map, part), getattr(expected, part)) for part in PARTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_may_be_written_between_other_values(dtype: torch.dtype) -> None:
    row_map = plan_rows(random_ids(30, 3, 6, 0.2), 6, align=4)
    y, wide = torch.randn(len(row_map.slot_R), 7).to(dtype), torch.full((30, 12), 5.0, dtype=dtype)
    out = unpermute(y, row_map, out=wide[:, 2:9])
    assert out.data_ptr() == wide[:, 2:9].data_ptr() and torch.equal(wide[:, 2:9], unpermute(y, row_map))
    assert (wide[:, :2] == 5).all() and (wide[:, 9:] == 5).all()


def test_nothing_waits_for_the_device() -> None:
    rows = torch.randn(4, 16).bfloat16()
    with record_waits() as waits:
        row_map = plan_message(IDS, 3, 2, room=9, fixed=True)
        message = pack_message(rows, row_map, IDS, WEIGHTS)
        layout = MessageLayout.of(rows, 3)
        unpack_message(message, plan_rows(layout.ids_of(message), 2, room=256, first=2), layout)
    assert [name for name in waits if name != "index"] == []  # by numbers, not by a mask


ONE = plan_rows(torch.zeros(4, 1, dtype=torch.int64), 1, align=1)
BAD = [
    (
        lambda: plan_message(IDS.int(), 3, 2, room=9),
        r"int64 \[N, K\], or int16 as in a message, got torch.int32 \[4, 3\]",
    ),
    (lambda: plan_message(IDS, 0, 2, room=9), "num_peers and experts_per_peer must be at least 1 .* got 0, 2 and 9"),
    (
        lambda: plan_message(IDS, 3, 2, room=10, fixed=True),
        "room=10 must be a positive multiple of num_peers=3 .* use 12",
    ),
    (lambda: plan_message(IDS, 3, 2, room=0, fixed=True), "room=0 must be a positive multiple of num_peers=3 .* use 3"),
    (lambda: pack_message(torch.ones(3, 2), ONE), r"takes rows \[4, D\] as the row map says, got \[3, 2\]"),
    (lambda: pack_message(torch.ones(4, 2), ONE, IDS), "travel together"),
    (
        lambda: pack_message(torch.ones(4, 2), ONE, IDS, WEIGHTS.double()),
        "weights float32 of that shape, got torch.int64 .* torch.float64",
    ),
    (lambda: pack_message(torch.ones(4, 2), ONE, IDS[:2], WEIGHTS[:2]), r"topk_ids must be \[4, K\], got \[2, 3\]"),
    (lambda: pack_message(torch.ones(4, 2), ONE, sender=2**15), "sender=32768 must be from 0 to 32767"),
    (
        lambda: unpack_message(torch.zeros(4, 8, dtype=torch.uint8), ONE, MessageLayout(torch.float32, 2, 0)),
        r"must be uint8 \[4, 16\] .* got torch.uint8 \[4, 8\]",
    ),
    (
        lambda: unpack_message(torch.zeros(4, 32, dtype=torch.uint8), ONE, MessageLayout(torch.float32, 2, 3)),
        "the map has 1 copies a row, the message 3",
    ),
    (lambda: plan_rows(IDS, 6, order=torch.arange(3)), r"order must be int64 \[4\], .* got torch.int64 \[3\]"),
    (lambda: unpermute(torch.ones(4, 2), ONE, out=torch.ones(2, 4).T), "values side by side, .* strides"),
    (
        lambda: unpermute(torch.ones(4, 2), ONE, out=torch.ones(4, 3)),
        r"torch.float32 \[4, 2\] .* got torch.float32 \[4, 3\]",
    ),
]


@pytest.mark.parametrize(("call", "says"), BAD)
def test_bad_input_is_told_what_is_needed(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
