"""One micro-batch's pass through one block, phase by phase: what pipelines and overlapping schedules call.

Where a pass's input and its output's gradient come from are callables, asked by the phase that needs them and not
before: whatever the caller places in between hides the wait. Each phase leaves one small typed state for those after
it, forward and backward; a state is released by the last phase that reads it, so a pass keeps what its backward needs
and nothing else. The normed hidden state goes from attn to mlp as an operand and a placeholder for autograd.

Legend: T tokens, D model, K top-k, R received rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from fp8moe.layers.attention import Positions
from fp8moe.layers.balance import BalanceShare
from fp8moe.layers.dispatch import (
    Announced,
    Dispatched,
    Handle,
    deliver,
    handle_of_rows,
    receive,
)
from fp8moe.layers.moe import MoE, with_shared
from fp8moe.layers.operand import Activation, Fp8Gradient, Operand, Rows, detached_handle
from fp8moe.layers.phase import DeferredWgrads, DetachedGraph, Phase, run_detached
from fp8moe.model.block import Attended, Block
from fp8moe.model.context_phases import ContextPass
from fp8moe.model.loss import weight_on

State = TypeVar("State")


@dataclass(frozen=True)
class BalanceLoss:
    """Use of a block's balance loss: its weight in the total loss, and who adds up its values."""

    weight: float | Tensor
    tally: Callable[[Tensor], None]


@dataclass(frozen=True)
class AttnState:
    """attn -> dispatch, mlp: the cast input of the MLP, and the announcement of its rows, if they are dispatched.

    balance_share: where ranks share sequences, the value of this rank's share of the balance loss, on its way.
    """

    operand: Operand
    announced: Announced | None
    balance_share: BalanceShare | None = None


@dataclass(frozen=True)
class MlpState:
    """mlp -> combine and all backwards but attn's: the dispatch's state, the slot of its FP8 gradient."""

    dispatch_state: Any
    gradient: Fp8Gradient | None


@dataclass(frozen=True)
class CombineState:
    """combine -> output: the rows on their way back, and what is added to them."""

    message: Handle[Tensor]
    h_TD: Tensor
    shared_TD: Tensor | None


@dataclass(frozen=True)
class CombineBackwardState:
    """combine's backward -> mlp's, attn's: the gradient of the output, and its rows on their way to the experts."""

    dy_TD: Tensor
    message: Handle[Rows]


@dataclass(frozen=True)
class MlpBackwardState:
    """mlp's backward -> dispatch's, attn's: gradients of the output, of the normed state, of received rows."""

    dy_TD: Tensor
    d_normed_TD: Tensor | None
    d_rows: tuple[Tensor, Tensor] | None = None  # of received rows [R, D] and their weights [R], until they are sent


def release(state: State | None) -> State:
    """A state that must be there, for its last reader; the caller clears its place."""
    assert state is not None, "phases ran out of order"
    return state


class _BlockPass:
    """What both kinds of a block's pass share: source, gradient, the attn phase and its graph."""

    def __init__(self, block: Block, source: Callable[[], Tensor], positions: Positions, balance: BalanceLoss) -> None:
        self.block, self._source, self._positions, self._balance = block, source, positions, balance
        self._context = None if positions.context is None else ContextPass(block, source, positions)
        self._attn_wgrads, self._mlp_wgrads = DeferredWgrads(), DeferredWgrads()
        self._attn_state: AttnState | None = None
        self._mlp_backward_state: MlpBackwardState | None = None

    def backward_from(self, gradient: Callable[[], Tensor]) -> None:
        """Where the gradient of the output will come from."""
        self._gradient = gradient

    @property
    def _first_phases(self) -> tuple[Phase, ...]:
        return () if self._context is None else self._context.phases

    @property
    def input_gradient(self) -> Tensor:
        """The gradient of what the source gave."""
        return self._dx_TD if self._context is None else self._context.input_gradient

    def _attend(self) -> None:
        x_TD, own, state = (self._source(), (), None) if self._context is None else self._context.before_attn()

        def attn(x_TD: Tensor, *own: Tensor) -> tuple[tuple[Tensor, ...], AttnState]:
            attended: Attended
            if self._context is None:
                attended = self.block.attend(x_TD, self._positions)
            else:
                attended = self.block.attend_to_whole(x_TD, own, state, self._context.arrive, self._positions)
            outputs: tuple[Tensor, ...] = attended.h_TD, detached_handle(attended.x.autograd_handle)
            routed = attended.routed
            if routed is None:
                return outputs, AttnState(attended.x.operand, None)
            outputs = *outputs, routed.topk_weights_TK, routed.balance_loss
            return outputs, AttnState(attended.x.operand, routed.announced, routed.balance_share)

        self._attn_graph, self._attn_state = run_detached(attn, x_TD, *own, wgrads=self._attn_wgrads)

    def _attend_backward(self, *grads: Tensor | None) -> None:
        dx_TD, *d_own = self._attn_graph.backward(*grads)
        assert dx_TD is not None
        if self._context is None:
            self._dx_TD = dx_TD
        else:
            self._context.after_attn(dx_TD, *d_own)


class DensePass(_BlockPass):
    """A dense block: attn, then mlp; nothing to wait for."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (
            *self._first_phases,
            Phase("attn", "compute", self._attend, self._attn_backward, self._attn_wgrads.run),
            Phase("mlp", "compute", self._mlp, self._mlp_backward, self._mlp_wgrads.run),
        )

    def _mlp(self) -> None:
        operand, self._attn_state = release(self._attn_state).operand, None
        self._h_TD, handle_TD = self._attn_graph.take()

        def mlp(handle_TD: Tensor) -> tuple[tuple[Tensor], None]:
            assert self.block.mlp is not None
            return (self.block.mlp(Activation(handle_TD, operand)),), None

        self._mlp_graph, _ = run_detached(mlp, handle_TD, wgrads=self._mlp_wgrads)

    @property
    def output(self) -> Tensor:
        output_TD = self._h_TD + self._mlp_graph.take()[0]
        del self._h_TD
        return output_TD

    def _mlp_backward(self) -> None:
        dy_TD = self._gradient()
        (d_normed_TD,) = self._mlp_graph.backward(dy_TD)
        self._mlp_backward_state = MlpBackwardState(dy_TD, d_normed_TD)

    def _attn_backward(self) -> None:
        late, self._mlp_backward_state = release(self._mlp_backward_state), None
        self._attend_backward(late.dy_TD, late.d_normed_TD)


class MoePass(_BlockPass):
    """A block with experts: attn, dispatch, mlp, combine; messages start in their phase and are awaited by the next.

    The counts of a dispatch leave at the end of attn, as soon as experts are chosen; the dispatch reads them. Shared
    experts need no message: mlp begins with them, forward and backward, and they hide what mlp then waits for.
    """

    _shared_graph: DetachedGraph | None
    _experts_graph: DetachedGraph

    def __init__(self, block: Block, source: Callable[[], Tensor], positions: Positions, balance: BalanceLoss) -> None:
        super().__init__(block, source, positions, balance)
        self._dispatch_message: Handle[Dispatched] | None = None
        self._mlp_state: MlpState | None = None
        self._combine_state: CombineState | None = None
        self._combine_backward_state: CombineBackwardState | None = None
        self._dispatch_backward_message: Handle[tuple[Tensor, Tensor]] | None = None

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (
            *self._first_phases,
            Phase("attn", "compute", self._attn, self._attn_backward, self._attn_wgrads.run),
            Phase("dispatch", "communication", self._dispatch, self._dispatch_backward),
            Phase("mlp", "compute", self._mlp, self._mlp_backward, self._mlp_wgrads.run),
            Phase("combine", "communication", self._combine, self._combine_backward),
        )

    @property
    def _moe(self) -> MoE:
        assert self.block.moe is not None
        return self.block.moe

    def _attn(self) -> None:
        self._attend()
        if release(self._attn_state).balance_share is None:
            *_, balance_loss = self._attn_graph.outputs
            self._balance.tally(balance_loss)

    def _dispatch(self) -> None:
        state = release(self._attn_state)
        assert state.announced is not None
        weights_TK = self._attn_graph.outputs[2]
        self._dispatch_message = self._moe.dispatcher.dispatch(state.operand.rows, state.announced, weights_TK)
        self._attn_state = AttnState(state.operand, None, state.balance_share)

    def _mlp(self) -> None:
        message, self._dispatch_message = release(self._dispatch_message), None
        state, self._attn_state = release(self._attn_state), None
        self._h_TD, handle_TD, *_ = self._attn_graph.take()
        self._shared_graph = self._run_shared(handle_TD, state.operand)
        balance_share = state.balance_share
        del state  # the operand's rows are done with
        arrived = message.wait()
        if balance_share is not None:
            self._balance.tally(balance_share.value())

        def experts(handle_RD: Tensor, weights_R: Tensor) -> tuple[tuple[Tensor], MlpState]:
            received = receive(arrived, handle_RD, weights_R)
            return (self._moe.experts(received),), MlpState(received.state, received.gradient)

        inputs = handle_of_rows(arrived.rows_RD, like=handle_TD), arrived.weights_R
        self._experts_graph, self._mlp_state = run_detached(experts, *inputs, wgrads=self._mlp_wgrads)

    def _run_shared(self, handle_TD: Tensor, operand: Operand) -> DetachedGraph | None:
        shared = self._moe.shared
        if shared is None:
            return None

        def run(handle_TD: Tensor) -> tuple[tuple[Tensor], None]:
            return (shared(Activation(handle_TD, operand)),), None

        return run_detached(run, handle_TD, wgrads=self._mlp_wgrads)[0]

    def _combine(self) -> None:
        (y_RD,) = self._experts_graph.take()
        (shared_TD,) = (None,) if self._shared_graph is None else self._shared_graph.take()
        message = self._moe.dispatcher.combine(y_RD, release(self._mlp_state).dispatch_state)
        self._combine_state = CombineState(message, self._h_TD, shared_TD)
        del self._h_TD

    @property
    def output(self) -> Tensor:
        """Waits for combine."""
        state, self._combine_state = release(self._combine_state), None
        return state.h_TD + with_shared(state.message.wait(), state.shared_TD)

    def _combine_backward(self) -> None:
        dy_TD, state = self._gradient(), release(self._mlp_state)
        fp8 = state.gradient is not None
        message = self._moe.dispatcher.combine_backward(dy_TD, state.dispatch_state, fp8=fp8)
        self._combine_backward_state = CombineBackwardState(dy_TD, message)

    def _mlp_backward(self) -> None:
        late, self._combine_backward_state = release(self._combine_backward_state), None
        d_normed_TD = None
        if self._shared_graph is not None:
            (d_normed_TD,) = self._shared_graph.backward(late.dy_TD)
        dy_RD = deliver(late.message.wait(), release(self._mlp_state).gradient, like=late.dy_TD)
        d_handle_RD, d_weights_R = self._experts_graph.backward(dy_RD)
        assert d_handle_RD is not None and d_weights_R is not None
        self._mlp_backward_state = MlpBackwardState(late.dy_TD, d_normed_TD, (d_handle_RD, d_weights_R))

    def _dispatch_backward(self) -> None:
        state, self._mlp_state = release(self._mlp_state), None
        late = release(self._mlp_backward_state)
        dx_RD, dweights_R = release(late.d_rows)
        dispatcher = self._moe.dispatcher
        self._dispatch_backward_message = dispatcher.dispatch_backward(dx_RD, dweights_R, state.dispatch_state)
        self._mlp_backward_state = MlpBackwardState(late.dy_TD, late.d_normed_TD)

    def _attn_backward(self) -> None:
        message, self._dispatch_backward_message = release(self._dispatch_backward_message), None
        late, self._mlp_backward_state = release(self._mlp_backward_state), None
        d_normed_TD, d_weights_TK = message.wait()
        if late.d_normed_TD is not None:
            d_normed_TD = late.d_normed_TD + d_normed_TD
        d_balance = weight_on(d_weights_TK.device, self._balance.weight)
        self._attend_backward(late.dy_TD, d_normed_TD, d_weights_TK, d_balance)


def pass_through(
    block: Block, source: Callable[[], Tensor], positions: Positions, balance: BalanceLoss
) -> DensePass | MoePass:
    """A pass through `block` of the x [T, D] that `source` gives when it starts."""
    kind = DensePass if block.moe is None else MoePass
    return kind(block, source, positions, balance)
