"""down(SwiGLU(gate_up(x))), forward and backward as the recipe lays the casts, for dense, shared and routed experts.

One autograd function holds the three steps, because what passes between them is FP8 with its own caches, and autograd
needs none of it: the input of SwiGLU is kept in FP8, its output is recomputed for Wgrad (DeepSeek-V3 report, 3.3.3),
its gradient leaves as rows and columns at once. The same function serves `Linear` and, group by group,
`experts.GroupedLinear`: both offer fprop, dgrad and wgrad. The routing weight is applied here and nowhere else, so that
combine is a plain sum.

Legend: R rows (tokens, or received rows), D model, F hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fp8moe.kernels import swiglu as fp8
from fp8moe.kernels.fp8 import GRADIENT_AMAX_FLOOR
from fp8moe.kernels.silu_mul import silu_mul, silu_mul_backward
from fp8moe.layers.linear import Linear
from fp8moe.layers.operand import Activation, Fp8Gradient, Operand, Rows, activation, from_gradient, from_rows
from fp8moe.layers.phase import submit
from fp8moe.layers.recipe import Recipe, Recompute
from fp8moe.layers.recompute import Recallable


class Products(Protocol):
    """The three products of a weight; see `linear.Linear`."""

    def fprop(self, x: Rows) -> Tensor: ...
    def dgrad(self, dy: Rows) -> Tensor: ...
    def wgrad(self, dy_columns: Rows, x_columns: Rows) -> None: ...


class Mlp(nn.Module):
    """x [T, dim] -> [T, dim] through `hidden` features; the MLP of a dense block and of the shared experts."""

    def __init__(self, dim: int, hidden: int, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.gate_up = Linear(dim, 2 * hidden, recipe, matrix_rows=(hidden, hidden))
        self.down = Linear(hidden, dim, recipe)

    def cast(self, x_TD: Tensor | Recallable) -> Activation:
        """The cast of its input; by the recipe scales are powers of two."""
        return activation(x_TD, self.recipe, power_of_two=self.recipe.power_of_two(True))

    def forward(self, x: Tensor | Recallable | Activation) -> Tensor:
        if not isinstance(x, Activation):
            x = self.cast(x)
        weights = (self.gate_up.weight, self.down.weight)
        return gated_mlp(x, self.gate_up, self.down, self.recipe, parameters=weights)


def gated_mlp(
    x: Activation,
    gate_up: Products,
    down: Products,
    recipe: Recipe,
    *,
    parameters: tuple[Tensor, Tensor],
    weights_R: Tensor | None = None,
    gradient: Fp8Gradient | None = None,
) -> Tensor:
    """y [R, D] of x [R, D]; `weights_R` (FP32) multiply SwiGLU's output; `gradient` may bring dy in FP8.

    `parameters` are the two weights: only so that autograd enters when x needs no gradient.
    """
    return _GatedMlpFunction.apply(x.autograd_handle, weights_R, *parameters, x, gate_up, down, recipe, gradient)


class _GatedMlpFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, autograd_handle: Tensor, weights_R: Tensor | None, w1: Tensor, w2: Tensor, x: Activation,
        gate_up: Products, down: Products, recipe: Recipe, gradient: Fp8Gradient | None,
    ) -> Tensor:  # fmt: skip
        act = swiglu(recipe)
        hidden, cached = act.forward(gate_up.fprop(x.operand.rows), weights_R)
        ctx.x_columns, ctx.hidden_columns = x.operand.columns, hidden.columns
        ctx.cached, ctx.weights_R = cached, weights_R
        ctx.gate_up, ctx.down, ctx.recipe, ctx.act, ctx.gradient = gate_up, down, recipe, act, gradient
        return down.fprop(hidden.rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, down, x_columns, hidden_columns = ctx.gate_up, ctx.down, ctx.x_columns, ctx.hidden_columns
        delivered = ctx.gradient.take() if ctx.gradient else None
        if delivered is None:
            dy = from_gradient(grads[0], ctx.recipe)
        else:
            dy = from_rows(delivered, amax_floor=GRADIENT_AMAX_FLOOR)
        d_hidden_RF, dy_columns = down.dgrad(dy.rows), dy.columns
        submit(lambda: down.wgrad(dy_columns(), hidden_columns()))
        d_gate_up, dweights_R = ctx.act.backward(d_hidden_RF, ctx.cached, ctx.weights_R)
        d_gate_up_columns = d_gate_up.columns
        submit(lambda: gate_up.wgrad(d_gate_up_columns(), x_columns()))
        dx_RD = gate_up.dgrad(d_gate_up.rows) if ctx.needs_input_grad[0] else None
        return dx_RD, dweights_R, *(None,) * 7


class Swiglu(NamedTuple):
    """SwiGLU's forward and backward in one precision; what is `cached` between them is opaque to the caller.

    forward(gate_up [R, 2F], weights [R] | None)  ->  (Operand of silu(gate) * up * weight [R, F], what is cached)
    backward(dy [R, F], cached, weights)          ->  (Operand of d gate_up, d weights [R] | None)

    In BF16 and FP32 the output may be kept for Wgrad instead of being recomputed; FP8 has no such choice, since keeping
    it would give other bits than the recipe's, which makes columns from the cached copy of the input.
    """

    forward: Callable[[Tensor, Tensor | None], tuple[Operand, Any]]
    backward: Callable[[Tensor, Any, Tensor | None], tuple[Operand, Tensor | None]]


def _forward(gate_up: Tensor, weights: Tensor | None) -> tuple[Operand, Tensor]:
    return Operand(silu_mul(gate_up, weights), partial(silu_mul, gate_up, weights)), gate_up


def _forward_keeping(gate_up: Tensor, weights: Tensor | None) -> tuple[Operand, Tensor]:
    product = silu_mul(gate_up, weights)
    return Operand(product, lambda: product), gate_up


def _backward(dy: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Operand, Tensor | None]:
    d_gate_up, dweights = silu_mul_backward(dy, gate_up, weights)
    return Operand(d_gate_up, lambda: d_gate_up), dweights


def _fp8_forward(gate_up: Tensor, weights: Tensor | None, *, power_of_two: bool) -> tuple[Operand, Any]:
    rows, cached = fp8.swiglu(gate_up, weights, power_of_two=power_of_two)
    return Operand(rows, partial(fp8.swiglu_columns, cached, weights)), cached


def _fp8_backward(
    dy: Tensor, cached: Any, weights: Tensor | None, *, power_of_two: bool
) -> tuple[Operand, Tensor | None]:
    rows, columns, dweights = fp8.swiglu_backward(dy, cached, weights, power_of_two=power_of_two)
    return Operand(rows, lambda: columns), dweights


_RECOMPUTING = Swiglu(_forward, _backward)
_KEEPING = Swiglu(_forward_keeping, _backward)
_FP8 = {
    either: Swiglu(partial(_fp8_forward, power_of_two=either), partial(_fp8_backward, power_of_two=either))
    for either in (False, True)
}


def swiglu(recipe: Recipe) -> Swiglu:
    """The pair for `recipe`, which also says what BF16 and FP32 keep of the output."""
    if recipe.fp8:
        return _FP8[recipe.power_of_two(False)]
    return _RECOMPUTING if Recompute.SWIGLU in recipe.recompute else _KEEPING
