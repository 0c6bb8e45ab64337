"""Dispatch across ranks: a token goes once to each rank that holds one of its experts, and is fanned out there.

The receiver holds tokens in global order (source rank, then token), whatever way they came, and does what
`LocalDispatcher` does, with the experts it has. What comes back is one partial sum per (token, rank). Sending a row per
expert instead was refused: at top-8 over 8 nodes it is several times the bytes.

Counts, messages and sums of what comes back run on the communication stream; the fan-out to experts and its sum run
where the caller waits or starts, as they do on one rank. Memory: a rank receives at most all tokens of its group, and
R <= (copies for its experts) + 127 rows of padding an expert; `max_imbalance` refuses more than its multiple of an even
share before anything is allocated.

Legend: T tokens here, K top-k, D model, e local experts, W ranks, N rows received, R rows after the fan-out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fp8moe.kernels.fp8 import ceil_div
from fp8moe.kernels.permute import RowMap, permute, plan_rows, unpermute
from fp8moe.layers.dispatch import Announced, Dispatched, Handle, return_weights, select_weights
from fp8moe.layers.operand import Rows
from fp8moe.parallel.collectives import Message
from fp8moe.parallel.counts import (
    Capacity,
    Overflow,
    Places,
    Sizes,
    exact,
    fixed,
    fixed_order,
    origins,
    padded_rows,
)
from fp8moe.parallel.stream import communication_stream
from fp8moe.parallel.way import Axis, Cargo, Leg, Way, arrive, depart, in_order, plan_leg
from fp8moe.parallel.wire import joined, pack, row_bytes, unpack

MOST_EXPERTS = 2**15  # ids travel as int16


@dataclass(frozen=True)
class Layout:
    """How one dispatch went, for its three sisters: the way, and the fan-out at its end."""

    way: Way
    row_map: RowMap


@dataclass(frozen=True)
class _Arrived:
    rows: Tensor  # body, ids and weights, as bytes
    order_N: Tensor
    overflowed: Tensor | None
    way: Way
    room: int


class AllToAllDispatcher:
    """Experts spread evenly over the ranks of `group`: rank w holds experts [w e, (w + 1) e). One hop.

    chunks: messages a dispatch. capacity: fixed messages in place of exact counts; `verify` then reads what didn't fit.
    max_imbalance: rows a rank may receive, in multiples of what it sends; None: whatever comes.
    """

    def __init__(
        self,
        group: ProcessGroup,
        num_experts: int,
        *,
        chunks: int = 1,
        capacity: Capacity | None = None,
        max_imbalance: float | None = None,
    ) -> None:
        self._place(Places(group, num_experts, nodes=group.size(), ranks_per_node=1), chunks, capacity, max_imbalance)
        self.axes: tuple[Axis, ...] = (Axis(group, self.num_local_experts),)

    def _place(self, places: Places, chunks: int, capacity: Capacity | None, max_imbalance: float | None) -> None:
        if places.num_experts % places.ranks:
            raise ValueError(f"{places.num_experts} experts can't be spread evenly over {places.ranks} ranks")
        if places.num_experts > MOST_EXPERTS:
            raise ValueError(
                f"a dispatcher numbers at most {MOST_EXPERTS} experts, not {places.num_experts}: use fewer"
            )
        if chunks < 1:
            raise ValueError(f"a dispatch travels in at least 1 chunk, not {chunks}: use parallel.chunks=1")
        self.places, self.chunks, self.capacity, self.max_imbalance = places, chunks, capacity, max_imbalance
        self.num_local_experts = places.local_experts
        self._overflow = None if capacity is None else Overflow(places, capacity)

    def announce(self, topk_ids_TK: Tensor) -> Announced:
        """See `Dispatcher`. Collective over the group, as every verb is, in one order on all ranks.

        Exact counts go on the communication stream, whose thread alone waits for them; fixed sizes need none.
        """
        topk = topk_ids_TK.shape[1]
        if self.capacity is not None:
            if len(topk_ids_TK) > self.capacity.tokens:
                raise ValueError(
                    f"{len(topk_ids_TK)} tokens exceed the {self.capacity.tokens} that messages were sized for: "
                    "use fewer"
                )
            return Announced(topk_ids_TK, fixed(self.chunks, topk, self.places, self.capacity))
        pieces = topk_ids_TK.split(self._chunk_tokens(len(topk_ids_TK)))
        counts = communication_stream(topk_ids_TK.device).start(
            lambda: exact(pieces, self.places, self.max_imbalance), lambda sizes: sizes
        )
        return Announced(topk_ids_TK, counts)

    def dispatch(self, rows_TD: Rows, announced: Announced, topk_weights_TK: Tensor) -> Handle[Dispatched]:
        """See `Dispatcher`."""
        topk_ids_TK, topk = announced.topk_ids_TK, announced.topk_ids_TK.shape[1]

        def finish(arrived: _Arrived) -> Dispatched:
            cargo, _ = arrive(arrived.rows, row_bytes(rows_TD), topk)
            e, order_N = self.num_local_experts, arrived.order_N
            row_map = in_order(plan_rows(cargo.ids_TK[order_N], e, room=arrived.room), order_N)
            if self._overflow is not None and arrived.overflowed is not None:
                too_many = padded_rows(row_map.tokens_per_expert) > arrived.room
                self._overflow.note(arrived.overflowed | too_many, topk_ids_TK)
            rows_RD = permute(unpack(cargo.body, rows_TD), row_map)
            weights_R = select_weights(cargo.weights_TK, row_map)
            return Dispatched(rows_RD, weights_R, row_map.group_offsets, Layout(arrived.way, row_map))

        return communication_stream(topk_ids_TK.device).start(
            lambda: self._send(pack(rows_TD), announced, topk_weights_TK), finish
        )

    def combine(self, y_RD: Tensor, layout: Layout) -> Handle[Tensor]:
        """See `Dispatcher`."""
        partial_ND = unpermute(y_RD, layout.row_map)
        return communication_stream(y_RD.device).start(
            lambda: layout.way.back([partial_ND], "combine"), lambda sums: sums[0]
        )

    def dispatch_backward(self, dx_RD: Tensor, dweights_R: Tensor, layout: Layout) -> Handle[tuple[Tensor, Tensor]]:
        """See `Dispatcher`; the weights' gradients travel with the rows'."""
        parts = [unpermute(dx_RD, layout.row_map), return_weights(dweights_R, layout.row_map)]
        return communication_stream(dx_RD.device).start(
            lambda: layout.way.back(parts, "dispatch backward"), lambda sums: (sums[0], sums[1])
        )

    def combine_backward(self, dy_TD: Rows, layout: Layout) -> Handle[Rows]:
        """See `Dispatcher`."""
        return communication_stream(dy_TD.device).start(
            lambda: layout.way.forth(pack(dy_TD), "combine backward"),
            lambda rows: permute(unpack(rows, dy_TD), layout.row_map),
        )

    def verify(self) -> None:
        """ImbalanceError if fixed messages were too small since the last call; collective then, else nothing."""
        if self._overflow is not None:
            self._overflow.check()

    def _send(self, body_TB: Tensor, announced: Announced, weights_TK: Tensor) -> _Arrived:
        """The first journey, hop by hop, each planned from what the last one brought."""
        sizes: Sizes = announced.sizes if self.capacity is not None else announced.sizes.brought()
        tokens, topk = self._chunk_tokens(len(weights_TK)), weights_TK.shape[1]
        columns = (body_TB, announced.topk_ids_TK, weights_TK)
        cargos = [Cargo(*parts) for parts in zip(*(column.split(tokens) for column in columns), strict=True)]
        legs: list[list[Leg]] = [[] for _ in cargos]
        messages: list[Message] = []
        for hop, axis in enumerate(self.axes):
            last, messages = messages, []
            for chunk, first in enumerate(cargos):
                cargo = arrive(last[chunk].wait(), body_TB.shape[1], topk)[0] if hop else first
                leg = plan_leg(cargo.ids_TK, axis, sizes.splits[chunk][hop])
                legs[chunk].append(leg)
                origin = (
                    origins(len(cargo.body), self.places.nodes, body_TB.device) if hop and leg.splits.fixed else None
                )
                messages.append(leg.forth(depart(cargo, leg, origin), "dispatch" if hop == 0 else "dispatch, hop 2"))
        rows = [message.wait() for message in messages]
        return self._arrived(Way(legs, tokens, [len(r) for r in rows]), joined(rows), sizes)

    def _arrived(self, way: Way, rows: Tensor, sizes: Sizes) -> _Arrived:
        if sizes.order_N is not None:
            return _Arrived(rows, sizes.order_N, None, way, sizes.room)
        legs = [leg for chunk in way.legs for leg in chunk]
        over = torch.stack([(leg.row_map.tokens_per_expert > leg.splits.sent[0]).any() for leg in legs]).any()
        order_N = fixed_order(rows, self.chunks, self.places, two_hops=len(self.axes) > 1)
        return _Arrived(rows, order_N, over, way, sizes.room)

    def _chunk_tokens(self, tokens: int) -> list[int]:
        """Tokens of each chunk: even, or, with fixed messages, as many as those have room for."""
        step = ceil_div(tokens if self.capacity is None else self.capacity.tokens, self.chunks)
        return [max(0, min(step, tokens - i * step)) for i in range(self.chunks)]
