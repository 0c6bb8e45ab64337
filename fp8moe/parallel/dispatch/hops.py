"""Route of a dispatch: one or two hops to the experts, and the same hops in return.

A hop is an all-to-all over one group. A row is sent once to each peer that leads to one of its experts, with the ids
and weights of all its experts; the peer picks those that it leads to, and either holds them (the last hop) or sends the
row on. On the return each hop returns one partial sum a row, and the sender adds those of each row in FP32, in order of
peer. What is sent is put together once a token and copied once a peer, by the permutation's kernel.

A batch may travel as several messages (chunks of consecutive tokens): the second hop of one chunk then runs beside the
first hop of the next. Rows arrive ordered by chunk, last sender, origin; `order` is where each row of the global order
(rank of origin, then token) lies, so that every dispatcher hands the experts the same rows in the same order.

Legend: T tokens of a chunk, K top-k, S rows sent, N rows that arrive after the last hop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fp8moe.kernels.permute import RowMap, permute, plan_rows, unpermute
from fp8moe.kernels.row_map import invert
from fp8moe.parallel.collectives import PendingAllToAll, start_all_to_all
from fp8moe.parallel.dispatch.payload import as_bytes, from_bytes, joined

Sent = TypeVar("Sent")


@dataclass(frozen=True)
class HopGroup:
    """One hop's group; each peer leads to `experts_per_peer` experts, numbered in order of peer."""

    group: ProcessGroup
    experts_per_peer: int

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return self.group.size()


@dataclass(frozen=True)
class Splits:
    """Rows that one chunk's hop sends to each peer and gets from it. fixed: as many for all, padded, never counted."""

    sent: list[int]
    received: list[int]
    fixed: bool = False


@dataclass(frozen=True)
class Hop:
    """One hop of one chunk: which row of the sender each sent row is, and the splits."""

    peers: HopGroup
    row_map: RowMap
    splits: Splits

    def send(self, rows_S: Tensor, name: str) -> PendingAllToAll:
        """Start to send rows [S, bytes] to the peers."""
        return start_all_to_all(rows_S, self.splits.sent, self.splits.received, self.peers.group, name)

    def send_back(self, rows: Tensor, name: str) -> PendingAllToAll:
        """Start to send partial sums of the rows that arrived back to their senders."""
        return start_all_to_all(rows, self.splits.received, self.splits.sent, self.peers.group, name)


@dataclass(frozen=True)
class Payload:
    """Rows of a chunk before a hop: bytes [T, B], expert ids [T, K] int64 within the hop's reach (-1: not there)."""

    body: Tensor
    ids_TK: Tensor
    weights_TK: Tensor


def destinations(ids_TK: Tensor, peers: HopGroup) -> Tensor:
    """The peers that each token goes to, [T, min(K, peers)] in ascending order, then -1."""
    nowhere = peers.size
    peer_TK = torch.where(ids_TK < 0, nowhere, ids_TK // peers.experts_per_peer).sort(dim=1).values
    again_TK = torch.zeros_like(peer_TK, dtype=torch.bool)
    again_TK[:, 1:] = peer_TK[:, 1:] == peer_TK[:, :-1]
    peer_TK = peer_TK.masked_fill(again_TK, nowhere).sort(dim=1).values[:, : peers.size]
    return peer_TK.masked_fill(peer_TK == nowhere, -1)


def plan_hop(ids_TK: Tensor, peers: HopGroup, splits: Splits) -> Hop:
    """Which rows go to which peer. With fixed splits rows past a peer's room are counted but not sent."""
    peer_TK = destinations(ids_TK, peers)
    if not splits.fixed:
        return Hop(peers, plan_rows(peer_TK, peers.size, align=1, room=sum(splits.sent)), splits)
    dense = plan_rows(peer_TK, peers.size, align=1, room=peer_TK.numel())
    return Hop(peers, _spread(dense, splits.sent[0]), splits)


def _spread(dense: RowMap, room: int) -> RowMap:
    """The map with `room` rows for every group: padding behind short ones, long ones cut."""
    offsets = dense.group_offsets.long()
    position = offsets[:-1, None] + torch.arange(room, device=offsets.device)
    empty = (position >= offsets[1:, None]).flatten()
    slot_R = torch.cat([dense.slot_R, dense.slot_R.new_full((1,), -1)])
    slot_R = slot_R[position.flatten().clamp(max=len(dense.slot_R))].masked_fill(empty, -1)
    return RowMap(
        source_R=torch.where(slot_R < 0, -1, slot_R // max(dense.topk, 1)),
        slot_R=slot_R,
        group_offsets=torch.arange(0, len(offsets) * room, room, device=offsets.device, dtype=torch.int32),
        tokens_per_expert=dense.tokens_per_expert,
        row_of_slot=invert(slot_R, dense.num_rows * dense.topk),
        num_rows=dense.num_rows,
        topk=dense.topk,
    )


def pack_payload(payload: Payload, hop: Hop, extra: Tensor | None = None) -> Tensor:
    """The sent rows [S, bytes]: body, ids (int16, inverted), weights (FP32), `extra` [T, n] (int16).

    Inverted ids make the zero bytes of rows that a fixed message has left over read as experts that are not there.
    """
    parts = [payload.body, as_bytes(~payload.ids_TK.to(torch.int16)), as_bytes(payload.weights_TK)]
    if extra is not None:
        parts.append(as_bytes(extra))
    return _rows_of(torch.cat(parts, dim=1), hop)


def unpack_payload(rows: Tensor, body_bytes: int, topk: int, peers: HopGroup) -> tuple[Payload, Tensor]:
    """Rows that arrived by a hop over `peers`: the payload, with the ids of experts here, and the bytes of `extra`."""
    body, ids, weights, extra = rows.split(
        [body_bytes, 2 * topk, 4 * topk, rows.shape[1] - body_bytes - 6 * topk], dim=1
    )
    first = peers.group.rank() * peers.experts_per_peer
    ids_NK = (~from_bytes(ids, torch.int16)).long() - first
    here_NK = (ids_NK >= 0) & (ids_NK < peers.experts_per_peer)
    return Payload(body, ids_NK.masked_fill(~here_NK, -1), from_bytes(weights, torch.float32)), extra


@dataclass(frozen=True)
class Route:
    """The hops of one dispatch: `hops[chunk][number]`; `tokens[chunk]` tokens leave, `arrived[chunk]` rows arrive."""

    hops: list[list[Hop]]
    tokens: list[int]
    arrived: list[int]

    def send(self, body_TB: Tensor, name: str) -> Tensor:
        """Rows [T, B] of bytes along the route once more -> [N, B], as they arrive."""
        pieces = body_TB.split(self.tokens)
        messages = [hops[0].send(_rows_of(x, hops[0]), name) for x, hops in zip(pieces, self.hops, strict=True)]
        for number in range(1, len(self.hops[0])):
            messages = [
                hops[number].send(_rows_of(message.wait(), hops[number]), f"{name}, hop {number + 1}")
                for message, hops in zip(messages, self.hops, strict=True)
            ]
        return joined([message.wait() for message in messages])

    def send_back(self, parts: list[Tensor], name: str) -> list[Tensor]:
        """Tensors [N, *] as rows arrived, all in one message -> the sums of each token's, [T, *]."""
        dtypes, widths = [p.dtype for p in parts], [p.shape[1] * p.element_size() for p in parts]
        pieces: list[Tensor] = list(joined([as_bytes(p) for p in parts], dim=1).split(self.arrived))
        sums: list[list[Tensor]] = []
        for number in reversed(range(len(self.hops[0]))):
            label = name if number == 0 else f"{name}, hop {number + 1}"
            messages = [hops[number].send_back(x, label) for x, hops in zip(pieces, self.hops, strict=True)]
            sums = []
            for message, hops in zip(messages, self.hops, strict=True):
                columns = message.wait().split(widths, dim=1)
                values = [from_bytes(c, dtype) for c, dtype in zip(columns, dtypes, strict=True)]
                sums.append([unpermute(v, hops[number].row_map) for v in values])
            if number:
                pieces = [joined([as_bytes(p) for p in chunk], dim=1) for chunk in sums]
        return [joined(column) for column in zip(*sums, strict=True)]


@dataclass(frozen=True)
class DispatchState(Generic[Sent]):
    """What the other three verbs need of a dispatch: its route (DeepEP: its handle), and the fan-out after it."""

    route: Sent
    row_map: RowMap


def _rows_of(body: Tensor, hop: Hop) -> Tensor:
    rows_S = permute(body, hop.row_map)
    assert isinstance(rows_S, Tensor)
    return rows_S


def in_order(row_map: RowMap, order_N: Tensor) -> RowMap:
    """A map made for rows in the global order, for the same rows as they lie: row n of it is row `order_N[n]`."""
    here = row_map.slot_R >= 0
    order_N = torch.cat([order_N, order_N.new_zeros(1)])  # something to read when nothing arrived
    source_R = torch.where(here, order_N[row_map.source_R], -1)
    slot_R = torch.where(here, source_R * row_map.topk + row_map.slot_R % max(row_map.topk, 1), -1)
    rows = invert(slot_R, row_map.num_rows * row_map.topk)
    return replace(row_map, source_R=source_R, slot_R=slot_R, row_of_slot=rows)
