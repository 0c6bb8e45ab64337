"""All-to-all dispatch: a token goes once to each rank, or once to each node, that holds one of its experts.

The receiver holds tokens in global order (source rank, then token), whatever their route, and fans them out as
`LocalDispatcher` does, to the experts it has. What comes back is one partial sum per (token, rank). Sending a row per
expert instead was refused: at top-8 over 8 nodes it is several times the bytes.

With two hops (DeepSeek-V3 report, 3.2.2) the first goes to the peer of the same local index on each node that holds one
of the token's experts (at most M of them, where the router limits groups), the second from there to the ranks that hold
them; on the return each node adds its ranks' partial sums before one row a (token, node) crosses. Experts receive the
same rows in the same order; sums associate differently: experts of a rank, then ranks of a node, then nodes.

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
from fp8moe.kernels.permute import permute, plan_rows, unpermute
from fp8moe.layers.dispatch import Announced, Dispatched, Handle, gradient_rows, return_weights, select_weights
from fp8moe.layers.operand import Rows
from fp8moe.parallel.collectives import PendingAllToAll
from fp8moe.parallel.dispatch.counts import (
    Capacity,
    EpTopology,
    MessageSizes,
    Overflow,
    exact,
    fixed,
    fixed_order,
    origins,
    padded_rows,
)
from fp8moe.parallel.dispatch.hops import (
    DispatchState,
    Hop,
    HopGroup,
    Payload,
    Route,
    in_order,
    pack_payload,
    plan_hop,
    unpack_payload,
)
from fp8moe.parallel.dispatch.payload import joined, pack, row_bytes, unpack
from fp8moe.parallel.stream import communication_stream

MOST_EXPERTS = 2**15  # ids travel as int16


@dataclass(frozen=True)
class _Arrived:
    rows: Tensor  # body, ids and weights, as bytes
    order_N: Tensor
    overflowed: Tensor | None
    route: Route
    room: int


class AllToAllDispatcher:
    """Experts spread evenly over ranks: rank w holds experts [w e, (w + 1) e); rows travel by `hop_groups`, in order.

    `one_hop` and `two_hops` make the first two arguments. chunks: messages a dispatch. capacity: fixed messages in
    place of exact counts; `verify` then reads whether all fitted. max_imbalance: rows a rank may receive, as a multiple
    of an even share; None: no limit.
    """

    def __init__(
        self,
        topology: EpTopology,
        hop_groups: tuple[HopGroup, ...],
        *,
        chunks: int = 1,
        capacity: Capacity | None = None,
        max_imbalance: float | None = None,
    ) -> None:
        if topology.num_experts % topology.ranks:
            legal = [ranks for ranks in range(1, topology.ranks) if topology.num_experts % ranks == 0]
            raise ValueError(
                f"model.experts.num_experts={topology.num_experts} is not a multiple of parallel.ep={topology.ranks}: "
                f"use parallel.ep={legal[-1]}"
            )
        if topology.num_experts > MOST_EXPERTS:
            raise ValueError(
                f"model.experts.num_experts={topology.num_experts} exceeds the {MOST_EXPERTS} that a dispatcher can "
                f"number: use at most {MOST_EXPERTS}"
            )
        if chunks < 1:
            raise ValueError(f"parallel.chunks={chunks} must be at least 1: use parallel.chunks=1")
        self.topology, self.hop_groups, self.chunks = topology, hop_groups, chunks
        self.capacity, self.max_imbalance = capacity, max_imbalance
        self.num_local_experts = topology.local_experts
        self._overflow = None if capacity is None else Overflow(topology, capacity)

    def announce(self, topk_ids_TK: Tensor) -> Announced:
        """See `Dispatcher`. Collective over the group, as every verb is, in one order on all ranks.

        Exact counts go on the communication stream, whose thread alone waits for them; fixed sizes need none.
        """
        topk = topk_ids_TK.shape[1]
        if self.capacity is not None:
            if len(topk_ids_TK) > self.capacity.tokens:
                raise ValueError(
                    f"{len(topk_ids_TK)} tokens exceed the {self.capacity.tokens} that fixed messages were sized for: "
                    f"dispatch at most {self.capacity.tokens} at once"
                )
            return Announced(topk_ids_TK, fixed(self.chunks, topk, self.topology, self.capacity))
        pieces = topk_ids_TK.split(self._chunk_tokens(len(topk_ids_TK)))
        counts = communication_stream(topk_ids_TK.device).start(
            lambda: exact(pieces, self.topology, self.max_imbalance), lambda sizes: sizes, "counts", takes_sms=False
        )
        return Announced(topk_ids_TK, counts)

    def dispatch(self, rows_TD: Rows, announced: Announced, topk_weights_TK: Tensor) -> Handle[Dispatched]:
        """See `Dispatcher`."""
        topk_ids_TK, topk = announced.topk_ids_TK, announced.topk_ids_TK.shape[1]

        def finish(arrived: _Arrived) -> Dispatched:
            payload, _ = unpack_payload(arrived.rows, row_bytes(rows_TD), topk, self.hop_groups[-1])
            e, order_N = self.num_local_experts, arrived.order_N
            row_map = in_order(plan_rows(payload.ids_TK[order_N], e, room=arrived.room), order_N)
            if self._overflow is not None and arrived.overflowed is not None:
                too_many = padded_rows(row_map.tokens_per_expert) > arrived.room
                self._overflow.note(arrived.overflowed | too_many, topk_ids_TK)
            rows_RD = permute(unpack(payload.body, rows_TD), row_map)
            weights_R = select_weights(payload.weights_TK, row_map)
            return Dispatched(rows_RD, weights_R, row_map.group_offsets, DispatchState(arrived.route, row_map))

        return communication_stream(topk_ids_TK.device).start(
            lambda: self._send(pack(rows_TD), announced, topk_weights_TK), finish, "dispatch"
        )

    def combine(self, y_RD: Tensor, state: DispatchState[Route]) -> Handle[Tensor]:
        """See `Dispatcher`."""
        partial_ND = unpermute(y_RD, state.row_map)
        return communication_stream(y_RD.device).start(
            lambda: state.route.send_back([partial_ND], "combine"), lambda sums: sums[0], "combine"
        )

    def dispatch_backward(
        self, dx_RD: Tensor, dweights_R: Tensor, state: DispatchState[Route]
    ) -> Handle[tuple[Tensor, Tensor]]:
        """See `Dispatcher`; the weights' gradients travel with the rows'."""
        parts = [unpermute(dx_RD, state.row_map), return_weights(dweights_R, state.row_map)]
        return communication_stream(dx_RD.device).start(
            lambda: state.route.send_back(parts, "dispatch backward"),
            lambda sums: (sums[0], sums[1]),
            "dispatch backward",
        )

    def combine_backward(self, dy_TD: Tensor, state: DispatchState[Route], *, fp8: bool = False) -> Handle[Rows]:
        """See `Dispatcher`."""
        sent_TD = gradient_rows(dy_TD, fp8=fp8)
        return communication_stream(dy_TD.device).start(
            lambda: state.route.send(pack(sent_TD), "combine backward"),
            lambda rows: permute(unpack(rows, sent_TD), state.row_map),
            "combine backward",
        )

    def verify(self) -> None:
        """ImbalanceError if fixed messages were too small since the last call; collective then, else nothing."""
        if self._overflow is not None:
            self._overflow.check()

    def _send(self, body_TB: Tensor, announced: Announced, weights_TK: Tensor) -> _Arrived:
        """The first dispatch along a new route, hop by hop, each planned from what the last one delivered."""
        sizes: MessageSizes = announced.sizes if self.capacity is not None else announced.sizes.arrived()
        tokens, topk = self._chunk_tokens(len(weights_TK)), weights_TK.shape[1]
        columns = (body_TB, announced.topk_ids_TK, weights_TK)
        payloads = [Payload(*parts) for parts in zip(*(column.split(tokens) for column in columns), strict=True)]
        hops: list[list[Hop]] = [[] for _ in payloads]
        messages: list[PendingAllToAll] = []
        for number, peers in enumerate(self.hop_groups):
            last, messages = messages, []
            name = "dispatch" if number == 0 else "dispatch, hop 2"
            for chunk, first in enumerate(payloads):
                payload = first
                if number:
                    payload, _ = unpack_payload(last[chunk].wait(), body_TB.shape[1], topk, self.hop_groups[number - 1])
                hop = plan_hop(payload.ids_TK, peers, sizes.splits[chunk][number])
                hops[chunk].append(hop)
                origin = None
                if number and hop.splits.fixed:
                    origin = origins(len(payload.body), self.topology.nodes, body_TB.device)
                messages.append(hop.send(pack_payload(payload, hop, origin), name))
        rows = [message.wait() for message in messages]
        return self._arrived(Route(hops, tokens, [len(r) for r in rows]), joined(rows), sizes)

    def _arrived(self, route: Route, rows: Tensor, sizes: MessageSizes) -> _Arrived:
        if sizes.order_N is not None:
            return _Arrived(rows, sizes.order_N, None, route, sizes.room)
        hops = [hop for chunk in route.hops for hop in chunk]
        over = torch.stack([(hop.row_map.tokens_per_expert > hop.splits.sent[0]).any() for hop in hops]).any()
        order_N = fixed_order(rows, self.chunks, self.topology, two_hops=len(self.hop_groups) > 1)
        return _Arrived(rows, order_N, over, route, sizes.room)

    def _chunk_tokens(self, tokens: int) -> list[int]:
        """Tokens of each chunk: even, or, with fixed messages, as many as those have room for."""
        step = ceil_div(tokens if self.capacity is None else self.capacity.tokens, self.chunks)
        return [max(0, min(step, tokens - i * step)) for i in range(self.chunks)]


def one_hop(group: ProcessGroup, num_experts: int) -> tuple[EpTopology, tuple[HopGroup, ...]]:
    """Every token straight to the ranks of `group` that hold its experts."""
    topology = EpTopology(group, num_experts, nodes=group.size(), ranks_per_node=1)
    return topology, (HopGroup(group, topology.local_experts),)


def two_hops(
    group: ProcessGroup, rail: ProcessGroup | None, node: ProcessGroup | None, num_experts: int
) -> tuple[EpTopology, tuple[HopGroup, ...]]:
    """Every token once to each node, then inside it: `group` is nodes of neighbouring ranks.

    rail: ranks of one local index; node: ranks of one node. Either may be None where it would be this rank alone.
    """
    nodes, local = (1 if g is None else g.size() for g in (rail, node))
    assert nodes * local == group.size(), (nodes, local, group.size())
    topology = EpTopology(group, num_experts, nodes, local)
    e = topology.local_experts
    hops = (None if rail is None else HopGroup(rail, local * e), None if node is None else HopGroup(node, e))
    return topology, tuple(hop for hop in hops if hop is not None)
