"""The verbs of an all-to-all dispatch that is one message of fixed size, cut there: packed, sent, unpacked.

Within captured compute (`captured`) a message is the host's; what packs and unpacks it are launches like any others,
and belong into the graphs. A token that is generated waits for the host's launches, and those are most of a mixture's.
The bits are those of `AllToAllDispatcher`, which runs a verb as one message of its stream.

Legend: T tokens here, K top-k, D model, N rows received, R rows after the fan-out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeGuard, TypeVar

from torch import Tensor

from fp8moe.kernels.message import MessageLayout, pack_message, unpack_message
from fp8moe.kernels.permute import unpermute
from fp8moe.layers.dispatch import Announced, Dispatched, Dispatcher, Handle, gradient_rows
from fp8moe.layers.operand import Rows
from fp8moe.parallel.collectives import start_all_to_all
from fp8moe.parallel.device_stream import communication_stream
from fp8moe.parallel.dispatch.all_to_all import AllToAllDispatcher, Arrived, packed_gradients, packed_rows
from fp8moe.parallel.dispatch.hops import DispatchState, Route, Splits, plan_hop

Value = TypeVar("Value")


@dataclass(frozen=True)
class Cut(Generic[Value]):
    """A verb: its message [rows, bytes], how that is sent, and what is made of the one that arrives.

    `send` keeps no tensor of the verb.
    """

    message: Tensor
    send: Callable[[Tensor], Handle[Tensor]]
    finish: Callable[[Tensor], Value]


class OneMessage:
    """Verbs of a dispatcher that `can_cut`."""

    def __init__(self, dispatcher: AllToAllDispatcher) -> None:
        assert can_cut(dispatcher)
        self._dispatcher = dispatcher
        (self._peers,) = dispatcher.hop_groups

    def dispatch(self, rows_TD: Rows, announced: Announced, topk_weights_TK: Tensor) -> Cut[Dispatched]:
        """See `Dispatcher`, as all of these."""
        ids_TK, sizes = announced.topk_ids_TK, announced.sizes
        ((splits,),) = sizes.splits
        layout, hop = MessageLayout.of(rows_TD, ids_TK.shape[1]), plan_hop(ids_TK, self._peers, splits)
        message = pack_message(
            rows_TD, hop.row_map, ids_TK, topk_weights_TK, sender=self._dispatcher.topology.group.rank()
        )

        def finish(came: Tensor) -> Dispatched:
            route = Route([[hop]], [len(ids_TK)], [len(came)])
            return self._dispatcher.unpacked(Arrived(came, None, route, sizes), layout, ids_TK)

        return Cut(message, self._sending(splits, "dispatch"), finish)

    def combine(self, y_RD: Tensor, state: DispatchState[Route]) -> Cut[Tensor]:
        message, columns = packed_rows(y_RD, state)
        (hop,) = state.route.hops[0]
        return Cut(
            message, self._sending(hop.splits, "combine"), lambda came: unpermute(columns.of(came)[0], hop.row_map)
        )

    def dispatch_backward(
        self, dx_RD: Tensor, dweights_R: Tensor, state: DispatchState[Route]
    ) -> Cut[tuple[Tensor, Tensor]]:
        message, columns = packed_gradients(dx_RD, dweights_R, state)
        (hop,) = state.route.hops[0]

        def finish(came: Tensor) -> tuple[Tensor, Tensor]:
            dx, dweights = (unpermute(value, hop.row_map) for value in columns.of(came))
            return dx, dweights

        return Cut(message, self._sending(hop.splits, "dispatch backward"), finish)

    def combine_backward(self, dy_TD: Tensor, state: DispatchState[Route], *, fp8: bool = False) -> Cut[Rows]:
        sent_TD, (hop,) = gradient_rows(dy_TD, fp8=fp8), state.route.hops[0]
        layout = MessageLayout.of(sent_TD)
        return Cut(
            pack_message(sent_TD, hop.row_map),
            self._sending(hop.splits, "combine backward"),
            lambda came: unpack_message(came, state.row_map, layout)[0],
        )

    def _sending(self, splits: Splits, name: str) -> Callable[[Tensor], Handle[Tensor]]:
        """As many rows go to each peer as come from it, there and back."""
        group = self._peers.group

        def send(message: Tensor) -> Handle[Tensor]:
            return communication_stream(message.device).start(
                lambda: start_all_to_all(message, splits.sent, splits.received, group, name).wait(),
                lambda came: came,
                name,
            )

        return send


def can_cut(dispatcher: Dispatcher) -> TypeGuard[AllToAllDispatcher]:
    """Whether each verb is one message with room for every routing, so that nothing is counted on the host."""
    if not isinstance(dispatcher, AllToAllDispatcher) or dispatcher.capacity is None:
        return False
    return dispatcher.capacity.holds_all and dispatcher.chunks == len(dispatcher.hop_groups) == 1
