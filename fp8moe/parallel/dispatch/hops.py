"""Route of a dispatch: one or two hops to the experts, and the same hops in return.

A hop is an all-to-all over one group. A row is sent once to each peer that leads to one of its experts, with the ids
and weights of all its experts; the peer picks those that it leads to, and either holds them (the last hop) or sends the
row on as it is. On the return each hop returns one partial sum a row, and the sender adds those of each row in FP32, in
order of peer.

A batch may travel as several messages (chunks of consecutive tokens): the second hop of one chunk then runs beside the
first hop of the next. Rows arrive ordered by chunk, last sender, origin, and carry the rank that they started from, so
that every dispatcher can hand the experts the same rows in the same order: by that rank, then as they arrived.

Legend: T tokens of a chunk, K top-k, S rows sent, N rows that arrive after the last hop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor
from torch.distributed import ProcessGroup

from fp8moe.kernels.message import pack_message, plan_message
from fp8moe.kernels.permute import RowMap, permute, unpermute
from fp8moe.layers.operand import Rows
from fp8moe.parallel.collectives import PendingAllToAll, start_all_to_all
from fp8moe.parallel.dispatch.payload import Columns, joined, split_rows

Sent = TypeVar("Sent")


@dataclass(frozen=True)
class HopGroup:
    """One hop's group; each peer leads to `experts_per_peer` experts, from `first` on in order of peer."""

    group: ProcessGroup
    experts_per_peer: int
    first: int = 0

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

    def send_on(self, message: Tensor, name: str) -> PendingAllToAll:
        """Start to send rows [n, bytes] that arrived by the hop before."""
        rows_S = permute(message, self.row_map)
        assert isinstance(rows_S, Tensor)
        return self.send(rows_S, name)

    def send_back(self, rows: Tensor, name: str) -> PendingAllToAll:
        """Start to send partial sums of the rows that arrived back to their senders."""
        return start_all_to_all(rows, self.splits.received, self.splits.sent, self.peers.group, name)


def plan_hop(topk_ids: Tensor, peers: HopGroup, splits: Splits) -> Hop:
    """Which rows go to which peer. With fixed splits rows past a peer's room are counted but not sent."""
    row_map = plan_message(
        topk_ids,
        peers.size,
        peers.experts_per_peer,
        room=sum(splits.sent),
        first=peers.first,
        fixed=splits.fixed,
    )
    return Hop(peers, row_map, splits)


@dataclass(frozen=True)
class Route:
    """The hops of one dispatch: `hops[chunk][number]`; `tokens[chunk]` tokens leave, `arrived[chunk]` rows arrive."""

    hops: list[list[Hop]]
    tokens: list[int]
    arrived: list[int]

    def send(self, rows_TD: Rows, name: str) -> Tensor:
        """Rows [T, D] along the route once more -> the message [N, bytes], as it arrives."""
        pieces = split_rows(rows_TD, self.tokens)
        messages = [
            hops[0].send(pack_message(piece, hops[0].row_map), name)
            for piece, hops in zip(pieces, self.hops, strict=True)
        ]
        for number in range(1, len(self.hops[0])):
            messages = [
                hops[number].send_on(message.wait(), f"{name}, hop {number + 1}")
                for message, hops in zip(messages, self.hops, strict=True)
            ]
        return joined([message.wait() for message in messages])

    def send_back(self, message: Tensor, columns: Columns, name: str) -> list[Tensor]:
        """Columns of rows [N, bytes] as they arrived -> the sums of each token's, [T, *], column by column."""
        pieces: Sequence[Tensor] = message.split(self.arrived)
        for number in range(len(self.hops[0]) - 1, 0, -1):
            label = f"{name}, hop {number + 1}"
            messages = [hops[number].send_back(x, label) for x, hops in zip(pieces, self.hops, strict=True)]
            pieces = [
                _packed_sums(columns, came.wait(), hops[number].row_map)
                for came, hops in zip(messages, self.hops, strict=True)
            ]
            messages.clear()  # and with them the rows that came
        messages = [hops[0].send_back(x, name) for x, hops in zip(pieces, self.hops, strict=True)]
        sums = [
            [unpermute(value, hops[0].row_map) for value in columns.of(came.wait())]
            for came, hops in zip(messages, self.hops, strict=True)
        ]
        return [joined(column) for column in zip(*sums, strict=True)]


def _packed_sums(columns: Columns, message: Tensor, row_map: RowMap) -> Tensor:
    """The sums of each row's copies in a message, as a message."""
    packed = columns.empty(row_map.num_rows, message.device)
    for values, out in zip(columns.of(message), columns.of(packed), strict=True):
        unpermute(values, row_map, out=out)
    return packed


@dataclass(frozen=True)
class DispatchState(Generic[Sent]):
    """What the other three verbs need of a dispatch: its route (DeepEP: its handle), and the fan-out after it."""

    route: Sent
    row_map: RowMap
