"""A transformer block, cut at its communications into four phases: attn, dispatch, mlp, combine.

    attn      norm, attention, residual, norm, route, cast     compute
    dispatch  rows to the ranks of their experts               communication
    mlp       shared experts, grouped GEMMs, SwiGLU            compute
    combine   rows back, sum, residual                         communication

Where ranks share sequences attn is three: keys (norm and projections), gather (communication), attn (the rest). A dense
block has no experts' communication and no such phases. Training runs the phases (`phases`). `forward` calls the same
pieces in order under ordinary autograd: for evaluation of single blocks, export, and as the tests' reference. Both give
equal bits: sums are written in one order.

Legend: T tokens, D model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fp8moe.layers.attention import Positions
from fp8moe.layers.attention.context import Arrive, Local
from fp8moe.layers.dispatch import Dispatcher
from fp8moe.layers.mlp import Mlp
from fp8moe.layers.moe import MoE, Routed
from fp8moe.layers.norm import Feeds, RMSNorm
from fp8moe.layers.operand import Activation
from fp8moe.layers.recipe import Recipe
from fp8moe.model.config import ModelConfig


@dataclass(frozen=True)
class Attended:
    """What attn leaves: the residual stream h [T, D], its norm as the MLP's cast input, and the routing, if any."""

    h_TD: Tensor
    x: Activation
    routed: Routed | None


class Block(nn.Module):
    """x [T, D] -> x [T, D]; block number `layer` of the model, with a dense MLP or a mixture of experts."""

    def __init__(self, config: ModelConfig, layer: int, recipe: Recipe, dispatcher: Dispatcher) -> None:
        super().__init__()
        c = config
        self.layer = layer
        self.attn_norm = RMSNorm(c.dim, recipe, eps=c.norm_eps, feeds=Feeds.LINEAR)
        self.attn = c.attention.build(c.dim, recipe, norm_eps=c.norm_eps, layer=layer)
        self.mlp_norm = RMSNorm(c.dim, recipe, eps=c.norm_eps, feeds=Feeds.MLP if c.is_dense(layer) else Feeds.MOE)
        self.mlp: Mlp | None = None
        self.moe: MoE | None = None
        if c.is_dense(layer):
            self.mlp = Mlp(c.dim, c.dense_hidden, recipe)
        else:
            self.moe = MoE(c.dim, c.router, c.experts, recipe, dispatcher)

    def attend(self, x_TD: Tensor, positions: Positions) -> Attended:
        """The attn phase: attention and residual, then what the MLP needs of its norm.

        Each norm is one pass with the residual stream beside it: the sum before it, the sum of gradients behind it.
        """
        x_TD, normed_TD = self.attn_norm.with_residual(x_TD)
        return self._route(x_TD, self.attn(normed_TD, positions), positions)

    def local(self, x_TD: Tensor, positions: Positions) -> tuple[Tensor, Local]:
        """The keys phase: the residual stream, and what attention makes of this rank's tokens before the gather."""
        x_TD, normed_TD = self.attn_norm.with_residual(x_TD)
        return x_TD, self.attn.local(normed_TD, positions)

    def attend_to_whole(
        self, x_TD: Tensor, own: tuple[Tensor, ...], state: Any, arrive: Arrive, positions: Positions
    ) -> Attended:
        """The attn phase behind the gather; own, state: those of `Local`."""
        return self._route(x_TD, self.attn.finish(own, state, arrive, positions), positions)

    def _route(self, x_TD: Tensor, delta_TD: Tensor, positions: Positions) -> Attended:
        h_TD, normed_TD = self.mlp_norm.with_residual(x_TD, delta_TD)
        if self.moe is None:
            assert self.mlp is not None
            return Attended(h_TD, self.mlp.cast(normed_TD), None)
        exchange = None if positions.context is None else positions.context.exchange
        given_TK = positions.experts.get(self.layer)
        routed = self.moe.route(normed_TD, positions.num_sequences, exchange, given_TK)
        return Attended(h_TD, routed.x, routed)

    def forward(self, x_TD: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """-> the block's output and its sequence-wise balance loss (a scalar, zero for a dense block)."""
        attended = self.attend(x_TD, positions)
        h_TD, routed = attended.h_TD, attended.routed
        if routed is None:
            assert self.mlp is not None
            return h_TD + self.mlp(attended.x), h_TD.new_zeros(()).float()
        assert self.moe is not None
        y_TD, balance_loss = h_TD + self.moe(routed), routed.balance_loss
        if routed.balance_share is not None:
            balance_loss = balance_loss + routed.balance_share.value()
        return y_TD, balance_loss
