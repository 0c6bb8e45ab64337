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

from torch import Tensor
from torch.distributed import ProcessGroup

from fp8moe.kernels.fp8 import ceil_div
from fp8moe.kernels.message import MessageLayout, pack_message, unpack_message
from fp8moe.kernels.message_layout import MOST_EXPERTS
from fp8moe.kernels.permute import plan_rows, unpermute
from fp8moe.layers.dispatch import Announced, Dispatched, Handle, gradient_rows, return_weights
from fp8moe.layers.operand import Rows
from fp8moe.parallel.collectives import PendingAllToAll
from fp8moe.parallel.device_stream import communication_stream
from fp8moe.parallel.dispatch.counts import Capacity, Counts, EpTopology, MessageSizes, Needed, Overflow, exact, fixed
from fp8moe.parallel.dispatch.hops import DispatchState, Hop, HopGroup, Route, plan_hop
from fp8moe.parallel.dispatch.payload import Columns, joined, split_rows


@dataclass(frozen=True)
class Arrived:
    """What the last hop of a dispatch delivered, along which route."""

    message: Tensor  # rows [N, bytes]
    order_N: Tensor | None  # of the rows by the rank they started from, None where they lie so
    route: Route
    sizes: MessageSizes


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
        self._overflow = None if capacity is None or capacity.holds_all else Overflow(topology, capacity)

    def announce(self, topk_ids_TK: Tensor) -> Announced:
        """See `Dispatcher`. Collective over the group, as every verb is, in one order on all ranks.

        Exact counts go on the communication stream; fixed sizes need none.
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
            lambda: exact(pieces, self.topology, self.max_imbalance), lambda counts: counts, "counts", takes_sms=False
        )
        return Announced(topk_ids_TK, counts)

    def dispatch(self, rows_TD: Rows, announced: Announced, topk_weights_TK: Tensor) -> Handle[Dispatched]:
        """See `Dispatcher`."""
        topk_ids_TK = announced.topk_ids_TK
        layout = MessageLayout.of(rows_TD, topk_ids_TK.shape[1])
        return communication_stream(topk_ids_TK.device).start(
            lambda: self._send(rows_TD, layout, announced, topk_weights_TK),
            lambda arrived: self.unpacked(arrived, layout, topk_ids_TK),
            "dispatch",
            ready=None if self.capacity is not None else lambda: announced.sizes.has(Counts.are_here),
        )

    def unpacked(self, arrived: Arrived, layout: MessageLayout, topk_ids_TK: Tensor) -> Dispatched:
        """The rows of a message for each expert. topk_ids_TK: those that this rank sent."""
        row_map = plan_rows(
            layout.ids_of(arrived.message),
            self.num_local_experts,
            room=arrived.sizes.room,
            first=self.topology.first_expert,
            order=arrived.order_N,
        )
        if self._overflow is not None:
            hops = [hop.row_map.tokens_per_expert for chunk in arrived.route.hops for hop in chunk]
            self._overflow.note(Needed(hops, row_map.tokens_per_expert), arrived.sizes, topk_ids_TK)
        rows_RD, weights_R = unpack_message(arrived.message, row_map, layout)
        assert weights_R is not None
        return Dispatched(rows_RD, weights_R, row_map.group_offsets, DispatchState(arrived.route, row_map))

    def combine(self, y_RD: Tensor, state: DispatchState[Route]) -> Handle[Tensor]:
        """See `Dispatcher`."""
        message, columns = packed_rows(y_RD, state)
        return communication_stream(y_RD.device).start(
            lambda: state.route.send_back(message, columns, "combine"), lambda sums: sums[0], "combine"
        )

    def dispatch_backward(
        self, dx_RD: Tensor, dweights_R: Tensor, state: DispatchState[Route]
    ) -> Handle[tuple[Tensor, Tensor]]:
        """See `Dispatcher`; the weights' gradients travel with the rows'."""
        message, columns = packed_gradients(dx_RD, dweights_R, state)
        return communication_stream(dx_RD.device).start(
            lambda: state.route.send_back(message, columns, "dispatch backward"),
            lambda sums: (sums[0], sums[1]),
            "dispatch backward",
        )

    def combine_backward(self, dy_TD: Tensor, state: DispatchState[Route], *, fp8: bool = False) -> Handle[Rows]:
        """See `Dispatcher`."""
        sent_TD = gradient_rows(dy_TD, fp8=fp8)
        return communication_stream(dy_TD.device).start(
            lambda: state.route.send(sent_TD, "combine backward"),
            lambda message: unpack_message(message, state.row_map, MessageLayout.of(sent_TD))[0],
            "combine backward",
        )

    def verify(self) -> None:
        """ImbalanceError if fixed messages were too small since the last call; collective then, else nothing."""
        if self._overflow is not None:
            self._overflow.check()

    def _send(self, rows_TD: Rows, layout: MessageLayout, announced: Announced, weights_TK: Tensor) -> Arrived:
        """The first dispatch along a new route, hop by hop, each planned from what the last one delivered."""
        sizes: MessageSizes = announced.sizes if self.capacity is not None else announced.sizes.arrived().sizes()
        tokens, rank = self._chunk_tokens(len(weights_TK)), self.topology.group.rank()
        columns = split_rows(rows_TD, tokens), announced.topk_ids_TK.split(tokens), weights_TK.split(tokens)
        hops: list[list[Hop]] = []
        messages: list[PendingAllToAll] = []
        for splits, rows, ids, weights in zip(sizes.splits, *columns, strict=True):
            hop = plan_hop(ids, self.hop_groups[0], splits[0])
            hops.append([hop])
            messages.append(hop.send(pack_message(rows, hop.row_map, ids, weights, sender=rank), "dispatch"))
        for number, peers in enumerate(self.hop_groups[1:], start=1):
            last, messages = messages, []
            for chunk, message in enumerate(last):
                came = message.wait()
                hop = plan_hop(layout.ids_of(came), peers, sizes.splits[chunk][number])
                hops[chunk].append(hop)
                messages.append(hop.send_on(came, f"dispatch, hop {number + 1}"))
        arrived = [message.wait() for message in messages]
        route, whole = Route(hops, tokens, [len(rows) for rows in arrived]), joined(arrived)
        if len(messages) == len(self.hop_groups) == 1:
            return Arrived(whole, None, route, sizes)  # one message after the other, as their senders are numbered
        # Rows that a fixed message has left over come from nobody, rank -1, and stand first.
        senders, groups = layout.sender_of(whole), 1 + self.topology.ranks
        by_sender = plan_rows(senders, groups, align=1, room=len(whole), first=-1)
        return Arrived(whole, by_sender.source_R, route, sizes)

    def _chunk_tokens(self, tokens: int) -> list[int]:
        """Tokens of each chunk: even, or, with fixed messages, as many as those have room for."""
        step = ceil_div(tokens if self.capacity is None else self.capacity.tokens, self.chunks)
        return [max(0, min(step, tokens - i * step)) for i in range(self.chunks)]


def packed_rows(y_RD: Tensor, state: DispatchState[Route]) -> tuple[Tensor, Columns]:
    """A combine's message: the partial sum of each row that arrived."""
    columns = Columns(((y_RD.dtype, y_RD.shape[1]),))
    message = columns.empty(state.row_map.num_rows, y_RD.device)
    unpermute(y_RD, state.row_map, out=columns.of(message)[0])
    return message, columns


def packed_gradients(dx_RD: Tensor, dweights_R: Tensor, state: DispatchState[Route]) -> tuple[Tensor, Columns]:
    """That of a dispatch's backward: the sums of gradients, the weights' beside them."""
    columns = Columns(((dx_RD.dtype, dx_RD.shape[1]), (dweights_R.dtype, state.row_map.topk)))
    message = columns.empty(state.row_map.num_rows, dx_RD.device)
    dx_ND, dweights_NK = columns.of(message)
    unpermute(dx_RD, state.row_map, out=dx_ND)
    dweights_NK.copy_(return_weights(dweights_R, state.row_map))
    return message, columns


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
    reached = 0 if rail is None else rail.rank() * local * e  # the experts of this node
    hops = (None if rail is None else HopGroup(rail, local * e), None if node is None else HopGroup(node, e, reached))
    return topology, tuple(hop for hop in hops if hop is not None)
