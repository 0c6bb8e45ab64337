"""down(SwiGLU(gate_up(x))), forward and backward as the recipe lays the casts, for dense, shared and routed experts.

One autograd function holds the three steps, because what passes between them is FP8 with its own caches, and nothing
of it belongs on autograd's tape: the input of SwiGLU is kept in FP8, its output is recomputed for Wgrad, its gradient
leaves as rows and columns at once. The same function serves `Linear` and, group by group, `GroupedLinear`: both offer
fprop, dgrad and wgrad.

Legend: R rows (tokens, or received rows), D model, F hidden.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fp8moe.kernels.fp8 import GRADIENT_AMAX_FLOOR
from fp8moe.layers.linear import Linear
from fp8moe.layers.operand import Activation, Fp8Gradient, Rows, activation, from_gradient, from_rows
from fp8moe.layers.precision import Precision
from fp8moe.layers.recompute import DEFAULT, Recallable, Recompute
from fp8moe.layers.swiglu import Swiglu, swiglu
from fp8moe.layers.wgrad import submit


class Products(Protocol):
    """The three products of a weight; see `linear.Linear`."""

    def fprop(self, x: Rows) -> Tensor: ...
    def dgrad(self, dy: Rows) -> Tensor: ...
    def wgrad(self, dy_columns: Rows, x_columns: Rows) -> None: ...


class Mlp(nn.Module):
    """x [T, dim] -> [T, dim] through `hidden` features; the MLP of a dense block and of the shared experts."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        precision: Precision,
        recompute: frozenset[Recompute] = DEFAULT,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.precision = precision
        self.act = swiglu(precision, recompute=recompute)
        self.gate_up = Linear(dim, 2 * hidden, precision=precision, device=device)
        self.down = Linear(hidden, dim, precision=precision, device=device)

    def cast(self, x_TD: Tensor | Recallable) -> Activation:
        """The cast of its input; scales are powers of two."""
        return activation(x_TD, self.precision, power_of_two=True)

    def forward(self, x: Tensor | Recallable | Activation) -> Tensor:
        if not isinstance(x, Activation):
            x = self.cast(x)
        weights = (self.gate_up.weight, self.down.weight)
        return gated_mlp(x, self.gate_up, self.down, precision=self.precision, act=self.act, parameters=weights)


def gated_mlp(
    x: Activation,
    gate_up: Products,
    down: Products,
    *,
    precision: Precision,
    act: Swiglu,
    parameters: tuple[Tensor, Tensor],
    weights_R: Tensor | None = None,
    gradient: Fp8Gradient | None = None,
) -> Tensor:
    """y [R, D] of x [R, D]; `weights_R` (FP32) multiply SwiGLU's output; `gradient` may bring dy in FP8.

    `parameters` are the two weights: only so that autograd enters when x needs no gradient.
    """
    return _GatedMlpFunction.apply(x.edge, weights_R, *parameters, x, gate_up, down, precision, act, gradient)


class _GatedMlpFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, edge_RD: Tensor, weights_R: Tensor | None, w1: Tensor, w2: Tensor, x: Activation,
        gate_up: Products, down: Products, precision: Precision, act: Swiglu, gradient: Fp8Gradient | None,
    ) -> Tensor:  # fmt: skip
        hidden, cached = act.forward(gate_up.fprop(x.operand.rows), weights_R)
        ctx.x_columns, ctx.hidden_columns = x.operand.columns, hidden.columns
        ctx.cached, ctx.weights_R = cached, weights_R
        ctx.gate_up, ctx.down, ctx.precision, ctx.act, ctx.gradient = gate_up, down, precision, act, gradient
        return down.fprop(hidden.rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, down, x_columns, hidden_columns = ctx.gate_up, ctx.down, ctx.x_columns, ctx.hidden_columns
        delivered = ctx.gradient.take() if ctx.gradient else None
        if delivered is None:
            dy = from_gradient(grads[0], ctx.precision)
        else:
            dy = from_rows(delivered, amax_floor=GRADIENT_AMAX_FLOOR)
        d_hidden_RF, dy_columns = down.dgrad(dy.rows), dy.columns
        submit(lambda: down.wgrad(dy_columns(), hidden_columns()))
        d_gate_up, dweights_R = ctx.act.backward(d_hidden_RF, ctx.cached, ctx.weights_R)
        d_gate_up_columns = d_gate_up.columns
        submit(lambda: gate_up.wgrad(d_gate_up_columns(), x_columns()))
        dx_RD = gate_up.dgrad(d_gate_up.rows) if ctx.needs_input_grad[0] else None
        return dx_RD, dweights_R, *(None,) * 8
