"""One micro-batch's run through one block, phase by phase: what pipelines and overlapping schedules call.

A run keeps what its backward needs and nothing else. Where its input and its output's gradient come from are callables,
asked by the phase that needs them and not before: whatever the caller places in between hides the wait. What a phase
hands to the next is forgotten once it is used, and the normed hidden state goes from attn to mlp as an operand and a
stand-in for autograd.

Legend: T tokens, D model, K top-k, R received rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from fp8moe.layers.attention import Positions
from fp8moe.layers.dispatch import Dispatched, Dispatcher, Handle, arrived_edge, deliver, gradient_rows, receive
from fp8moe.layers.moe import MoE
from fp8moe.layers.operand import Activation, Fp8Gradient, Operand, Rows, edge_of
from fp8moe.layers.phase import Island, Phase
from fp8moe.layers.wgrad import WeightGradStore
from fp8moe.model.block import Block


@dataclass(frozen=True)
class BalanceLoss:
    """What becomes of a block's balance loss: its weight in the total loss, and who adds up its values."""

    weight: float
    tally: Callable[[Tensor], None]


class _BlockRun:
    """What both kinds of a block's run start from. `output` is read once: nothing else holds on to it."""

    input_gradient: Tensor

    def __init__(
        self,
        block: Block,
        source: Callable[[], Tensor],
        positions: Positions,
        balance: BalanceLoss,
        *,
        store: WeightGradStore,
        key: Hashable,
    ) -> None:
        self._block, self._source, self._positions, self._balance = block, source, positions, balance
        self._store, self._key = store, key

    def backward_from(self, gradient: Callable[[], Tensor]) -> None:
        """Where the gradient of the output will come from."""
        self._gradient = gradient

    def _late(self, phase: str) -> Callable[[], None]:
        """Computes the weight gradients that `phase` left; needs the run no more."""
        return partial(self._store.run, (self._key, phase))


class DenseRun(_BlockRun):
    """A dense block: attn, then mlp; nothing to wait for."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase("attn", "compute", self._attn, self._attn_backward, self._late("attn")),
            Phase("mlp", "compute", self._mlp, self._mlp_backward, self._late("mlp")),
        )

    def _attn(self) -> None:
        def attn(x_TD: Tensor) -> tuple[Tensor, ...]:
            h_TD, normed = self._block.attend(x_TD, self._positions)
            assert self._block.mlp is not None
            self._operand: Operand | None = self._block.mlp.cast(normed).operand
            return h_TD, edge_of(normed.tensor)

        self._attn_island = Island(attn, self._source(), store=self._store, key=(self._key, "attn"))

    def _mlp(self) -> None:
        self._h_TD, edge_TD = self._attn_island.take()
        operand, self._operand = self._operand, None  # its rows are done with after this

        def mlp(edge_TD: Tensor) -> tuple[Tensor]:
            assert operand is not None and self._block.mlp is not None
            return (self._block.mlp(Activation(edge_TD, operand)),)

        self._mlp_island = Island(mlp, edge_TD, store=self._store, key=(self._key, "mlp"))

    @property
    def output(self) -> Tensor:
        output_TD = self._h_TD + self._mlp_island.take()[0]
        del self._h_TD
        return output_TD

    def _mlp_backward(self) -> None:
        self._dy_TD = self._gradient()
        (self._d_normed_TD,) = self._mlp_island.backward(self._dy_TD)

    def _attn_backward(self) -> None:
        (dx_TD,) = self._attn_island.backward(self._dy_TD, self._d_normed_TD)
        assert dx_TD is not None
        self.input_gradient = dx_TD


class MoeRun(_BlockRun):
    """A block with experts: attn, dispatch, mlp, combine; messages start in their phase and are awaited by the next.

    The counts of a dispatch leave at the end of attn, as soon as experts are chosen; the dispatch reads them.
    """

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase("attn", "compute", self._attn, self._attn_backward, self._late("attn")),
            Phase("dispatch", "communication", self._dispatch, self._dispatch_backward),
            Phase("mlp", "compute", self._mlp, self._mlp_backward, self._late("mlp")),
            Phase("combine", "communication", self._combine, self._combine_backward),
        )

    @property
    def _moe(self) -> MoE:
        assert self._block.moe is not None
        return self._block.moe

    @property
    def _dispatcher(self) -> Dispatcher:
        return self._moe.dispatcher

    def _attn(self) -> None:
        def attn(x_TD: Tensor) -> tuple[Tensor, ...]:
            h_TD, normed = self._block.attend(x_TD, self._positions)
            routing = self._moe.router(normed, self._positions.num_sequences)
            self._announced = self._dispatcher.announce(routing.topk_ids_TK)
            self._operand: Operand | None = self._moe.cast(normed).operand
            return h_TD, edge_of(normed.tensor), routing.topk_weights_TK, routing.balance_loss

        self._attn_island = Island(attn, self._source(), store=self._store, key=(self._key, "attn"))
        self._balance.tally(self._attn_island.values[3])

    def _dispatch(self) -> None:
        weights_TK = self._attn_island.values[2]
        assert self._operand is not None
        self._dispatched: Handle[Dispatched] = self._dispatcher.dispatch(
            self._operand.rows, self._announced, weights_TK
        )
        del self._announced

    def _mlp(self) -> None:
        arrived = self._dispatched.wait()
        del self._dispatched
        self._h_TD, edge_TD, *_ = self._attn_island.take()
        operand, self._operand = self._operand, None  # its rows are done with after this
        self._layout, self._shared = arrived.layout, self._moe.shared is not None

        def mlp(edge_RD: Tensor, weights_R: Tensor, edge_TD: Tensor) -> tuple[Tensor, ...]:
            assert operand is not None
            received = receive(arrived, edge_RD, weights_R)
            self._box: Fp8Gradient | None = received.gradient
            y_RD, shared_TD = self._moe.run_experts(received, Activation(edge_TD, operand))
            return (y_RD,) if shared_TD is None else (y_RD, shared_TD)

        edge_RD = arrived_edge(arrived.rows_RD, like=edge_TD)
        self._mlp_island = Island(mlp, edge_RD, arrived.weights_R, edge_TD, store=self._store, key=(self._key, "mlp"))

    def _combine(self) -> None:
        y_RD, *self._shared_TD = self._mlp_island.take()
        self._combined: Handle[Tensor] = self._dispatcher.combine(y_RD, self._layout)

    @property
    def output(self) -> Tensor:
        """Waits for combine."""
        y_TD = self._combined.wait()
        for shared_TD in self._shared_TD:
            y_TD = shared_TD + y_TD
        output_TD = self._h_TD + y_TD
        del self._h_TD, self._shared_TD, self._combined
        return output_TD

    def _combine_backward(self) -> None:
        self._dy_TD = self._gradient()
        rows = gradient_rows(self._dy_TD, fp8=self._box is not None)
        self._returned: Handle[Rows] = self._dispatcher.combine_backward(rows, self._layout)

    def _mlp_backward(self) -> None:
        dy_RD = deliver(self._returned.wait(), self._box, like=self._dy_TD)
        d_shared = (self._dy_TD,) if self._shared else ()
        self._d_edge_RD, self._d_weights_R, self._d_normed_TD = self._mlp_island.backward(dy_RD, *d_shared)

    def _dispatch_backward(self) -> None:
        assert self._d_edge_RD is not None and self._d_weights_R is not None
        self._d_dispatched = self._dispatcher.dispatch_backward(self._d_edge_RD, self._d_weights_R, self._layout)

    def _attn_backward(self) -> None:
        d_normed_TD, d_weights_TK = self._d_dispatched.wait()
        if self._d_normed_TD is not None:
            d_normed_TD = self._d_normed_TD + d_normed_TD
        d_balance = d_weights_TK.new_full((), self._balance.weight)
        (dx_TD,) = self._attn_island.backward(self._dy_TD, d_normed_TD, d_weights_TK, d_balance)
        assert dx_TD is not None
        self.input_gradient = dx_TD


def run_block(
    block: Block,
    source: Callable[[], Tensor],
    positions: Positions,
    balance: BalanceLoss,
    *,
    store: WeightGradStore,
    key: Hashable,
) -> DenseRun | MoeRun:
    """A run of `block` on the x [T, D] that `source` gives when it starts; weight gradients wait under `key`."""
    run = DenseRun if block.moe is None else MoeRun
    return run(block, source, positions, balance, store=store, key=key)
