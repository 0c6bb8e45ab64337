"""The phases before attn where ranks share sequences: keys, and the gather that attn waits for.

    keys      norm, projections of this rank's tokens     compute
    gather    their keys' rows to the ranks that share the sequences; going back, shares of their gradients

Going back the order is attn, gather, keys; what a schedule puts between two of them hides the message.

Legend: T tokens of this rank, D model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fp8moe.layers.attention import Positions
from fp8moe.layers.attention.context import Local, Whole, leaves
from fp8moe.layers.dispatch import Handle
from fp8moe.layers.operand import Rows
from fp8moe.layers.phase import DeferredWgrads, Phase, run_detached
from fp8moe.model.block import Block


@dataclass(frozen=True)
class LateGradients:
    """attn's backward -> gather's, keys': gradients of the residual stream, of what stayed here, of what was gathered.

    The last are this rank's shares of whole sequences until `message` brings their sums for its own tokens.
    """

    dx_TD: Tensor | None
    d_own: tuple[Tensor | None, ...]
    shares: tuple[Tensor, ...] = ()
    message: Handle[tuple[Tensor, ...]] | None = None


class ContextPass:
    """The first two phases of a block's pass; the third calls `before_attn`, `arrive` and, going back, `after_attn`."""

    input_gradient: Tensor

    def __init__(self, block: Block, source: Callable[[], Tensor], positions: Positions) -> None:
        assert positions.context is not None
        self._block, self._source, self._positions = block, source, positions
        self._context, self._wgrads = positions.context, DeferredWgrads()
        self._local: Local | None = None
        self._message: Handle[tuple[Rows, ...]] | None = None
        self._handles: tuple[Tensor, ...] = ()
        self._late: LateGradients | None = None

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase("keys", "compute", self._keys, self._keys_backward, self._wgrads.run),
            Phase("gather", "communication", self._gather, self._gather_backward),
        )

    def _keys(self) -> None:
        def keys(x_TD: Tensor) -> tuple[tuple[Tensor, ...], Local]:
            x_TD, local = self._block.local(x_TD, self._positions)
            return (x_TD, *local.own, *local.shared), replace(local, shared=())

        self._graph, self._local = run_detached(keys, self._source(), wgrads=self._wgrads)

    def _gather(self) -> None:
        local = self._local
        assert local is not None
        self._message = self._context.exchange.gather(local.rows, self._context.num_sequences)
        self._local = replace(local, rows=())

    def before_attn(self) -> tuple[Tensor, tuple[Tensor, ...], Any]:
        """The residual stream [T, D], what stayed here, and its state; this pass forgets them."""
        local, self._local = self._local, None
        assert local is not None
        x_TD, *outputs = self._graph.take()
        return x_TD, tuple(outputs[: len(local.own)]), local.state

    def arrive(self) -> Whole:
        """What was gathered, as leaves of attn's graph; waits."""
        message, self._message = self._message, None
        assert message is not None
        whole = leaves(message.wait())
        self._handles = whole.handles
        return whole

    def after_attn(self, dx_TD: Tensor | None, *d_own: Tensor | None) -> None:
        """The gradients that attn's backward gave."""
        handles, self._handles = self._handles, ()
        shares = [handle.grad for handle in handles]
        self._late = LateGradients(dx_TD, d_own, tuple(share for share in shares if share is not None))
        assert len(self._late.shares) == len(shares), "attention reads all that was gathered"

    def _gather_backward(self) -> None:
        late = self._late
        assert late is not None
        message = self._context.exchange.scatter(late.shares, self._context.num_sequences)
        self._late = LateGradients(late.dx_TD, late.d_own, message=message)

    def _keys_backward(self) -> None:
        late, self._late = self._late, None
        assert late is not None and late.message is not None
        (dx_TD,) = self._graph.backward(late.dx_TD, *late.d_own, *late.message.wait())
        assert dx_TD is not None
        self.input_gradient = dx_TD
