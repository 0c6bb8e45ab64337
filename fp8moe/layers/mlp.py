"""down(SwiGLU(gate_up(x))), forward and backward as the recipe lays the casts, for dense, shared and routed experts.

One autograd function holds the three steps, because what passes between them is FP8 with its own caches, and autograd
needs none of it: the input of SwiGLU is kept in FP8, its output is recomputed for Wgrad (DeepSeek-V3 report, 3.3.3),
its gradient leaves as rows and columns at once. The same function serves `Linear` and, group by group,
`experts.GroupedLinear`: both offer fprop, dgrad and wgrad. The routing weight is applied here and nowhere else, so that
combine is a plain sum.

GPT-OSS's experts clamp what SwiGLU takes (`limit`) and have biases (`ExpertBiases`): that of gate and up is added with
the activation, in FP32 before the FP8 cast, that of the down projection to its product, times the routing weight. Their
gradients are sums of the columns that the weight gradients have made, and wait with them.

Legend: R rows (tokens, or received rows), D model, F hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fp8moe.kernels import swiglu as fp8
from fp8moe.kernels.expert_bias import add_expert_bias, expert_bias_dgrad, expert_bias_wgrad
from fp8moe.kernels.fp8 import GRADIENT_AMAX_FLOOR
from fp8moe.kernels.silu_mul import silu_mul, silu_mul_backward
from fp8moe.layers.linear import Linear, entry, main_grad_of
from fp8moe.layers.operand import Activation, Fp8Gradient, Operand, Rows, activation, from_gradient, from_rows
from fp8moe.layers.phase import submit
from fp8moe.layers.recipe import Recipe, Recompute
from fp8moe.layers.recompute import Recallable


class Products(Protocol):
    """The three products of a weight; see `linear.Linear`."""

    def fprop(self, x: Rows) -> Tensor: ...
    def dgrad(self, dy: Rows) -> Tensor: ...
    def wgrad(self, dy_columns: Rows, x_columns: Rows) -> None: ...


@dataclass(frozen=True)
class ExpertBiases:
    """Biases of gate and up [e, 2F] and of down [e, D], and the groups of rows, int32 [e + 1]; rows are weighted."""

    gate_up: nn.Parameter
    down: nn.Parameter
    group_offsets: Tensor


class Mlp(nn.Module):
    """x [T, dim] -> [T, dim] through `hidden` features; the MLP of a dense block and of the shared experts."""

    def __init__(self, dim: int, hidden: int, recipe: Recipe, *, limit: float | None = None) -> None:
        super().__init__()
        self.recipe, self.limit = recipe, limit
        self.gate_up = Linear(dim, 2 * hidden, recipe, matrix_rows=(hidden, hidden))
        self.down = Linear(hidden, dim, recipe)

    def cast(self, x_TD: Tensor | Recallable) -> Activation:
        """The cast of its input; by the recipe scales are powers of two."""
        return activation(x_TD, self.recipe, power_of_two=self.recipe.power_of_two(True))

    def forward(self, x: Tensor | Recallable | Activation) -> Tensor:
        if not isinstance(x, Activation):
            x = self.cast(x)
        return gated_mlp(x, self.gate_up, self.down, self.recipe, entry(x.autograd_handle, self.down), limit=self.limit)


def gated_mlp(
    x: Activation,
    gate_up: Products,
    down: Products,
    recipe: Recipe,
    entry: Tensor | None,
    *,
    weights_R: Tensor | None = None,
    gradient: Fp8Gradient | None = None,
    limit: float | None = None,
    biases: ExpertBiases | None = None,
) -> Tensor:
    """y [R, D] of x [R, D]; `weights_R` (FP32) multiply SwiGLU's output; `gradient` may bring dy in FP8.

    entry: see `linear.entry`. limit: of the clamped activation, None for plain SwiGLU. biases: of experts, whose rows
    have weights.
    """
    return _GatedMlpFunction.apply(
        x.autograd_handle, weights_R, entry, x, gate_up, down, swiglu(recipe, limit), recipe, gradient, biases
    )


class _GatedMlpFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, autograd_handle: Tensor, weights_R: Tensor | None, entry: Tensor | None, x: Activation,
        gate_up: Products, down: Products, act: Swiglu, recipe: Recipe, gradient: Fp8Gradient | None,
        biases: ExpertBiases | None,
    ) -> Tensor:  # fmt: skip
        hidden, cached = act.forward(gate_up.fprop(x.operand.rows), weights_R, biases)
        ctx.x_columns, ctx.hidden_columns = x.operand.columns, hidden.columns
        ctx.cached, ctx.weights_R, ctx.biases = cached, weights_R, biases
        ctx.gate_up, ctx.down, ctx.recipe, ctx.act, ctx.gradient = gate_up, down, recipe, act, gradient
        y_RD = down.fprop(hidden.rows)
        if biases is not None:
            add_expert_bias(y_RD, biases.down.detach(), biases.group_offsets, weights_R)
        return y_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, down, biases, weights_R = ctx.gate_up, ctx.down, ctx.biases, ctx.weights_R
        delivered = ctx.gradient.take() if ctx.gradient else None
        if delivered is None:
            dy = from_gradient(grads[0], ctx.recipe)
        else:
            dy = from_rows(delivered, amax_floor=GRADIENT_AMAX_FLOOR)
        d_hidden_RF = down.dgrad(dy.rows)
        submit(_wgrad(down, dy.columns, ctx.hidden_columns, biases and (biases.down, biases.group_offsets), weights_R))
        d_gate_up, dweights_R = ctx.act.backward(d_hidden_RF, ctx.cached, weights_R)
        if biases is not None and dweights_R is not None:
            expert_bias_dgrad(dy.rows, biases.down.detach(), biases.group_offsets, dweights_R)
        submit(_wgrad(gate_up, d_gate_up.columns, ctx.x_columns, biases and (biases.gate_up, biases.group_offsets)))
        dx_RD = gate_up.dgrad(d_gate_up.rows) if ctx.needs_input_grad[0] else None
        return dx_RD, dweights_R, *(None,) * 8


def _wgrad(
    linear: Products,
    dy_columns: Callable[[], Rows],
    x_columns: Callable[[], Rows],
    bias: tuple[nn.Parameter, Tensor] | None,
    weights_R: Tensor | None = None,
) -> Callable[[], None]:
    """The weight gradient of a product, and that of its bias, whose rows were weighted by `weights_R`."""

    def run() -> None:
        columns = dy_columns()
        linear.wgrad(columns, x_columns())
        if bias is not None:
            parameter, group_offsets = bias
            expert_bias_wgrad(columns, group_offsets, main_grad_of(parameter), weights_R)

    return run


class Swiglu(NamedTuple):
    """SwiGLU's forward and backward in one precision; what is `cached` between them is opaque to the caller.

    forward(gate_up [R, 2F], weights [R] | None, biases | None)  ->  (Operand of the weighted product [R, F], cached)
    backward(dy [R, F], cached, weights)                         ->  (Operand of d gate_up, d weights [R] | None)

    Forward may add the biases into `gate_up`, which nobody else reads. In BF16 and FP32 the output may be kept for
    Wgrad instead of being recomputed; FP8 has no such choice, since keeping it would give other bits than the recipe's,
    which makes columns from the cached copy of the input.
    """

    forward: Callable[[Tensor, Tensor | None, ExpertBiases | None], tuple[Operand, Any]]
    backward: Callable[[Tensor, Any, Tensor | None], tuple[Operand, Tensor | None]]


def _forward(
    gate_up: Tensor, weights: Tensor | None, biases: ExpertBiases | None = None, *, limit: float | None, keeps: bool
) -> tuple[Operand, Tensor]:
    if biases is not None:
        add_expert_bias(gate_up, biases.gate_up.detach(), biases.group_offsets)
    product = silu_mul(gate_up, weights, limit=limit)
    if keeps:
        return Operand(product, lambda: product), gate_up
    return Operand(product, partial(silu_mul, gate_up, weights, limit=limit)), gate_up


def _backward(
    dy: Tensor, gate_up: Tensor, weights: Tensor | None, *, limit: float | None
) -> tuple[Operand, Tensor | None]:
    d_gate_up, dweights = silu_mul_backward(dy, gate_up, weights, limit=limit)
    return Operand(d_gate_up, lambda: d_gate_up), dweights


def _fp8_forward(
    gate_up: Tensor,
    weights: Tensor | None,
    biases: ExpertBiases | None = None,
    *,
    limit: float | None,
    power_of_two: bool,
) -> tuple[Operand, Any]:
    bias = (None, None) if biases is None else (biases.gate_up.detach(), biases.group_offsets)
    rows, cached = fp8.swiglu(gate_up, weights, *bias, limit=limit, power_of_two=power_of_two)
    return Operand(rows, partial(fp8.swiglu_columns, cached, weights, limit=limit)), cached


def _fp8_backward(
    dy: Tensor, cached: Any, weights: Tensor | None, *, limit: float | None, power_of_two: bool
) -> tuple[Operand, Tensor | None]:
    rows, columns, dweights = fp8.swiglu_backward(dy, cached, weights, limit=limit, power_of_two=power_of_two)
    return Operand(rows, lambda: columns), dweights


@functools.cache
def swiglu(recipe: Recipe, limit: float | None = None) -> Swiglu:
    """The pair for `recipe`, which also says what BF16 and FP32 keep of the output; limit: see `kernels.swiglu`."""
    if recipe.fp8:
        power_of_two = recipe.power_of_two(False)
        return Swiglu(
            partial(_fp8_forward, limit=limit, power_of_two=power_of_two),
            partial(_fp8_backward, limit=limit, power_of_two=power_of_two),
        )
    keeps = Recompute.SWIGLU not in recipe.recompute
    return Swiglu(partial(_forward, limit=limit, keeps=keeps), partial(_backward, limit=limit))
