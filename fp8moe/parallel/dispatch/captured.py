"""A dispatcher between ranks within captured compute (`layers.cuda_graph`): its verbs and waits stand between graphs.

A verb is given tensors whose memory is the graphs' and is used again, and gives tensors that are elsewhere each time.
So both go by way of buffers that lie still, one for each argument and result of each verb, the same for all layers: the
graph before a verb copies into them, what has arrived is copied into them, the graph behind it copies out of them. At
the time of a verb its last message has been waited for, by the layer before. Refused: the graphs' own tensors kept
alive for the verbs, a layer's rows [R, D] four times over.

What the dispatcher keeps of a dispatch (`Dispatched.state`) passes from verb to verb outside the graphs. Verbs of one
message each with room for every routing are cut closer (`one_message`): packed and unpacked within the graphs, so that
the host launches the message alone.

Outside a capture the dispatcher is called as it is. Within one its messages have fixed sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fp8moe.layers.cuda_graph import Captured, capture, outside
from fp8moe.layers.dispatch import Announced, Dispatched, Dispatcher, Handle
from fp8moe.layers.operand import Rows
from fp8moe.parallel.dispatch.one_message import Cut, OneMessage, can_cut

Value = TypeVar("Value")


class _State:
    """What the dispatcher keeps of the dispatch of this turn."""

    value: Any = None


@dataclasses.dataclass(frozen=True)
class _Handle(Generic[Value]):
    """A message whose start stands outside the graphs; `arrive` waits for it there and leaves what came in buffers."""

    arrive: Callable[[], None]
    buffers: dict[str, Any]
    name: str
    made: Callable[[Any], Value]

    def wait(self) -> Value:
        outside(self.arrive)
        return self.made(_each(self.buffers[self.name], torch.clone))


class CapturableDispatcher:
    """`dispatcher`, whose verbs may be called while a graph is captured."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher, self.num_local_experts = dispatcher, dispatcher.num_local_experts
        self._cut = OneMessage(dispatcher) if can_cut(dispatcher) else None
        self._buffers: WeakKeyDictionary[Captured, dict[str, Any]] = WeakKeyDictionary()

    def announce(self, topk_ids_TK: Tensor) -> Announced:
        """See `Dispatcher`; with messages of fixed sizes nothing is sent."""
        return self._dispatcher.announce(topk_ids_TK)

    def dispatch(self, rows_TD: Rows, announced: Announced, topk_weights_TK: Tensor) -> Handle[Dispatched]:
        """See `Dispatcher`."""
        if capture() is None:
            return self._dispatcher.dispatch(rows_TD, announced, topk_weights_TK)
        if self._cut is not None:
            return self._message("dispatch", self._cut.dispatch(rows_TD, announced, topk_weights_TK))
        state, sizes = _State(), announced.sizes

        def start(rows_TD: Rows, ids_TK: Tensor, weights_TK: Tensor) -> Handle[Dispatched]:
            return self._dispatcher.dispatch(rows_TD, Announced(ids_TK, sizes), weights_TK)

        def tensors(arrived: Dispatched) -> Any:
            state.value = arrived.state
            return arrived.rows_RD, arrived.weights_R, arrived.group_offsets

        given = rows_TD, announced.topk_ids_TK, topk_weights_TK
        return self._between(
            "dispatch", start, given, tensors, lambda arrived: Dispatched(arrived[0], arrived[1], arrived[2], state)
        )

    def combine(self, y_RD: Tensor, state: Any) -> Handle[Tensor]:
        """See `Dispatcher`."""
        if capture() is None:
            return self._dispatcher.combine(y_RD, state)
        if self._cut is not None:
            return self._message("combine", self._cut.combine(y_RD, state))
        return self._between("combine", lambda y_RD: self._dispatcher.combine(y_RD, state.value), (y_RD,))

    def dispatch_backward(self, dx_RD: Tensor, dweights_R: Tensor, state: Any) -> Handle[tuple[Tensor, Tensor]]:
        """See `Dispatcher`."""
        if capture() is None:
            return self._dispatcher.dispatch_backward(dx_RD, dweights_R, state)
        if self._cut is not None:
            return self._message("dispatch backward", self._cut.dispatch_backward(dx_RD, dweights_R, state))

        def start(dx_RD: Tensor, dweights_R: Tensor) -> Handle[tuple[Tensor, Tensor]]:
            return self._dispatcher.dispatch_backward(dx_RD, dweights_R, state.value)

        return self._between("dispatch backward", start, (dx_RD, dweights_R))

    def combine_backward(self, dy_TD: Tensor, state: Any, *, fp8: bool = False) -> Handle[Rows]:
        """See `Dispatcher`."""
        if capture() is None:
            return self._dispatcher.combine_backward(dy_TD, state, fp8=fp8)
        if self._cut is not None:
            return self._message("combine backward", self._cut.combine_backward(dy_TD, state, fp8=fp8))

        def start(dy_TD: Tensor) -> Handle[Rows]:
            return self._dispatcher.combine_backward(dy_TD, state.value, fp8=fp8)

        return self._between("combine backward", start, (dy_TD,))

    def verify(self) -> None:
        """See `Dispatcher`."""
        self._dispatcher.verify()

    def _message(self, name: str, cut: Cut[Value]) -> _Handle[Value]:
        """Send the message of a verb between the graphs that pack and unpack it."""
        return self._between(name, cut.send, (cut.message,), made=cut.finish)

    def _between(
        self,
        name: str,
        start: Callable[..., Handle[Any]],
        given: tuple[Any, ...],
        tensors: Callable[[Any], Any] = lambda arrived: arrived,
        made: Callable[[Any], Any] = lambda arrived: arrived,
    ) -> _Handle[Any]:
        """Start the message `name` of what `given` holds in every turn.

        tensors: of what arrives, those that go on into the graphs; made: of their copies, what the caller gets.
        """
        message: list[Handle[Any]] = []
        now = capture()
        assert now is not None
        buffers = self._buffers.setdefault(now, {})
        sent = _into(buffers, f"{name}: sent", given)

        def send() -> None:
            message[:] = [start(*sent)]

        def arrive() -> None:
            _into(buffers, f"{name}: arrived", tensors(message.pop().wait()))

        outside(send)
        return _Handle(arrive, buffers, f"{name}: arrived", made)


def _into(buffers: dict[str, Any], name: str, values: Any) -> Any:
    """Copy `values` into the buffers of that name, which are made by the first, and give these."""
    if name not in buffers:
        buffers[name] = _each(values, torch.empty_like)
    _each(buffers[name], torch.Tensor.copy_, values)
    return buffers[name]


def _each(value: Any, call: Callable[..., Tensor], *others: Any) -> Any:
    """`call` of each tensor in a value, its items or fields, with the same of `others` -> a value of the results."""
    if isinstance(value, Tensor):
        return call(value, *others)
    if isinstance(value, tuple):
        return tuple(_each(one, call, *rest) for one, *rest in zip(value, *others, strict=True))
    names = [field.name for field in dataclasses.fields(value) if isinstance(getattr(value, field.name), Tensor)]
    return dataclasses.replace(
        value, **{name: _each(getattr(value, name), call, *(getattr(o, name) for o in others)) for name in names}
    )
