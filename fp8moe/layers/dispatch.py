"""Dispatch of rows to experts and back: the protocol, its one-rank form, and its use under ordinary autograd.

A dispatcher has four verbs on plain data, in two pairs of duals (DeepEP's insight): the backward of dispatch is a
combine, the backward of combine is a dispatch, both by the state that the forward left. Each verb returns a handle at
once and `wait()` gives the result, so that a schedule may compute in between. Forward rows travel in FP8 with their
power-of-two scales, and so do the gradients that combine's backward sends; what comes back is BF16 and is summed.

A dispatch is announced first, as soon as its experts are chosen: how many rows go where is then known, or being
exchanged, when the rows are ready. Only the dispatch that an announcement is given to waits for it.

`dispatched` and `combined` call the verbs under autograd and wait at once: the model without a schedule.

Legend: T tokens, K top-k, D model, E experts, e local experts, R received rows (each expert's group 128-aligned).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import GRADIENT_AMAX_FLOOR, Fp8Tensor
from fp8moe.kernels.permute import RowMap, permute, permute_quantize, plan_rows, unpermute
from fp8moe.kernels.quantize import quantize_rows
from fp8moe.kernels.row_map import most_rows
from fp8moe.layers.operand import Activation, Fp8Gradient, Rows, from_rows, placeholder

Value = TypeVar("Value", covariant=True)


class Handle(Protocol[Value]):
    """A message in flight."""

    def wait(self) -> Value: ...


@dataclass(frozen=True)
class Ready(Generic[Value]):
    """A message that has arrived."""

    value: Value

    def wait(self) -> Value:
        return self.value


@dataclass(frozen=True)
class Announced:
    """A batch whose experts are chosen, int64 [T, K]; `sizes` is what the dispatcher is finding out meanwhile."""

    topk_ids_TK: Tensor
    sizes: Any = None


@dataclass(frozen=True)
class Dispatched:
    """What a dispatch delivers: rows [R, D], their routing weights [R] (FP32, 0 for padding), where groups begin.

    `state` is what the dispatcher's other verbs need of this dispatch, and nobody else reads.
    """

    rows_RD: Rows
    weights_R: Tensor
    group_offsets: Tensor
    state: Any


class Dispatcher(Protocol):
    """Four verbs and their announcement; `num_local_experts` of the experts are this rank's."""

    num_local_experts: int

    def announce(self, topk_ids_TK: Tensor) -> Announced:
        """Let other ranks know how many rows are coming; every announcement is followed by its dispatch."""
        ...

    def dispatch(self, rows_TD: Rows, announced: Announced, topk_weights_TK: Tensor) -> Handle[Dispatched]: ...

    def combine(self, y_RD: Tensor, state: Any) -> Handle[Tensor]:
        """[R, D] -> [T, D]: the plain sum over a token's rows."""
        ...

    def dispatch_backward(self, dx_RD: Tensor, dweights_R: Tensor, state: Any) -> Handle[tuple[Tensor, Tensor]]:
        """-> dx [T, D] and d topk_weights [T, K]."""
        ...

    def combine_backward(self, dy_TD: Tensor, state: Any, *, fp8: bool = False) -> Handle[Rows]:
        """[T, D] -> [R, D]: each token's gradient to all of its rows; fp8: cast as by `gradient_rows`."""
        ...

    def verify(self) -> None:
        """Raise if rows of a dispatch since the last call had no room; called once before each optimizer step."""
        ...


class LocalDispatcher:
    """One rank holds all experts: dispatch is a permutation, and nothing of it is waited for.

    On a GPU the rows have room for every routing, up to 127 more an expert than some need: the number of rows is then
    known on the host. On a CPU it can be read at no cost.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_local_experts = num_experts

    def announce(self, topk_ids_TK: Tensor) -> Announced:
        return Announced(topk_ids_TK)

    def dispatch(self, rows_TD: Rows, announced: Announced, topk_weights_TK: Tensor) -> Ready[Dispatched]:
        ids_TK, num_experts = announced.topk_ids_TK, self.num_local_experts
        room = None if ids_TK.device.type == "cpu" else most_rows(ids_TK.numel(), num_experts)
        row_map = plan_rows(ids_TK, num_experts, room=room)
        weights_R = select_weights(topk_weights_TK, row_map)
        return Ready(Dispatched(permute(rows_TD, row_map), weights_R, row_map.group_offsets, row_map))

    def combine(self, y_RD: Tensor, state: RowMap) -> Ready[Tensor]:
        return Ready(unpermute(y_RD, state))

    def dispatch_backward(self, dx_RD: Tensor, dweights_R: Tensor, state: RowMap) -> Ready[tuple[Tensor, Tensor]]:
        return Ready((unpermute(dx_RD, state), return_weights(dweights_R, state)))

    def combine_backward(self, dy_TD: Tensor, state: RowMap, *, fp8: bool = False) -> Ready[Rows]:
        if fp8:  # on the way: nobody else wants the cast
            return Ready(permute_quantize(dy_TD, state, amax_floor=GRADIENT_AMAX_FLOOR, power_of_two=True))
        return Ready(permute(dy_TD, state))

    def verify(self) -> None:
        """One rank has room for all rows."""


def select_weights(topk_weights_TK: Tensor, row_map: RowMap) -> Tensor:
    """The routing weight of each row, [R] FP32; 0 for padding."""
    weights_R = permute(topk_weights_TK.reshape(-1), row_map.of_slots())
    assert isinstance(weights_R, Tensor)
    return weights_R


def return_weights(dweights_R: Tensor, row_map: RowMap) -> Tensor:
    """The dual of `select_weights`: [R] -> [N, K], zero where no row went. Each slot has at most one row."""
    return unpermute(dweights_R[:, None], row_map.of_slots()).view(row_map.num_rows, row_map.topk)


@dataclass(frozen=True)
class Received:
    """A `Dispatched` that autograd follows, for the experts."""

    x: Activation
    weights_R: Tensor
    group_offsets: Tensor
    state: Any
    gradient: Fp8Gradient | None


def receive(rows: Dispatched, autograd_handle_RD: Tensor, weights_R: Tensor) -> Received:
    """Delivered rows with what autograd follows of them; FP8 rows also with a slot for their FP8 gradient."""
    gradient = Fp8Gradient() if isinstance(rows.rows_RD, Fp8Tensor) else None
    x = Activation(autograd_handle_RD, from_rows(rows.rows_RD))
    return Received(x, weights_R, rows.group_offsets, rows.state, gradient)


def handle_of_rows(rows_RD: Rows, *, like: Tensor) -> Tensor:
    """What autograd follows of delivered rows: themselves, or a placeholder."""
    return placeholder(rows_RD.shape, like) if isinstance(rows_RD, Fp8Tensor) else rows_RD


def gradient_rows(dy_TD: Tensor, *, fp8: bool) -> Rows:
    """What combine's backward sends between ranks: FP8 rows with power-of-two scales, or the gradient as it is."""
    if not fp8:
        return dy_TD
    return quantize_rows(dy_TD, amax_floor=GRADIENT_AMAX_FLOOR, power_of_two=True)


def dispatched(dispatcher: Dispatcher, x: Activation, announced: Announced, topk_weights_TK: Tensor) -> Received:
    """Dispatch and wait, under autograd."""
    arrived = dispatcher.dispatch(x.operand.rows, announced, topk_weights_TK.detach()).wait()
    handle_RD, weights_R = _Dispatch.apply(x.autograd_handle, topk_weights_TK, dispatcher, arrived)
    return receive(arrived, handle_RD, weights_R)


def combined(dispatcher: Dispatcher, y_RD: Tensor, received: Received) -> Tensor:
    """Combine and wait, under autograd."""
    return _Combine.apply(y_RD, dispatcher, received.state, received.gradient)


class _Dispatch(torch.autograd.Function):
    """Lets autograd follow what has arrived, back to the tensors it came from."""

    @staticmethod
    def forward(
        ctx: Any, handle_TD: Tensor, weights_TK: Tensor, dispatcher: Dispatcher, arrived: Dispatched
    ) -> tuple[Tensor, Tensor]:
        ctx.dispatcher, ctx.state = dispatcher, arrived.state
        return handle_of_rows(arrived.rows_RD, like=handle_TD), arrived.weights_R

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx_TD, dweights_TK = ctx.dispatcher.dispatch_backward(*grads, ctx.state).wait()
        return dx_TD, dweights_TK, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, dispatcher: Dispatcher, state: Any, gradient: Fp8Gradient | None) -> Tensor:
        ctx.dispatcher, ctx.state, ctx.gradient = dispatcher, state, gradient
        return dispatcher.combine(y_RD, state).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        rows = ctx.dispatcher.combine_backward(grads[0], ctx.state, fp8=ctx.gradient is not None).wait()
        return deliver(rows, ctx.gradient, like=grads[0]), None, None, None


def deliver(rows: Rows, gradient: Fp8Gradient | None, *, like: Tensor) -> Tensor:
    """The gradient for autograd: the rows themselves, or a placeholder while the FP8 rows wait in their slot."""
    if isinstance(rows, Fp8Tensor):
        assert gradient is not None
        gradient.put(rows)
        return placeholder(rows.shape, like)
    return rows
