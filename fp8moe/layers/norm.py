"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, statistics in FP32, output in the dtype of x.

A norm writes what its consumers read and nothing else (`Feeds`): under FP8 the kernel that norms also adds the residual
before it and casts the rows behind it, so that y exists in BF16 only where somebody multiplies it so. What comes out is
a `Normed`, which says how to get each form.

Backward keeps the input, which the residual stream or a latent keeps anyway, and 1/rms, 4 bytes a token. Under
recomputation it keeps nothing else: columns are made of both, and whoever needs y recalls it. That is at most twice
where Wgrad waits; keeping y from one to the other was refused, it is the memory to be saved. The gain's gradient is
added into FP32 `main_grad` by the backward itself, unrounded: `.grad` of a BF16 parameter would have rounded it.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.norm import rms_norm, rms_norm_backward, rms_norm_columns
from fp8moe.kernels.quantize import quantize_columns, quantize_rows
from fp8moe.layers.linear import entry
from fp8moe.layers.operand import Normed, ReadyCast, placeholder
from fp8moe.layers.recipe import Recipe, Recompute


class Feeds(Enum):
    """Who reads a norm's output: (y itself, rows under FP8, rows whose scales are powers of two, rows travel)."""

    TENSOR = (True, False, False, False)  # what is never FP8, or is joined with something first
    LINEAR = (False, True, False, False)
    MLP = (False, True, True, False)
    MOE = (True, True, True, True)  # the router reads y, dispatch and shared experts the rows
    GATHER = (False, True, True, True)  # Linears of other ranks


class RMSNorm(nn.Module):
    """x [T, D] -> [T, D]; `weight` [D], ones at first. It needs its `main_grad` (`linear.attach_main_grads`)."""

    def __init__(self, dim: int, recipe: Recipe, *, eps: float, feeds: Feeds = Feeds.TENSOR) -> None:
        super().__init__()
        self.eps = eps
        self.recompute = Recompute.NORM in recipe.recompute
        tensor, rows, usual, travels = feeds.value
        # Rows that travel have no choice.
        self.power_of_two = usual if travels else recipe.power_of_two(usual)
        self.rows = rows and recipe.fp8
        self.tensor = tensor or not self.rows or not self.recompute
        self.weight = nn.Parameter(torch.ones(dim, dtype=recipe.dtype))

    def forward(self, x: Tensor) -> Normed:
        """The norm of x [T, D]."""
        return self._norm(x, None, residual=False)[1]

    def with_residual(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Normed]:
        """h = x + delta, or x without it, [T, D], and the norm of h: one pass, and one that sums both gradients back.

        Whoever goes on with the residual stream must use this h: the gradient of h comes back together with the norm's.
        """
        return self._norm(x, delta, residual=True)

    def _norm(self, x: Tensor, delta: Tensor | None, *, residual: bool) -> tuple[Tensor, Normed]:
        made: list[_Made] = []
        followed = x if delta is None or x.requires_grad else delta
        h, y = _RMSNormFunction.apply(x, delta, entry(followed, self), self, made, residual)
        source, inverse_rms, rows = made.pop()
        values = None if self.recompute else y.detach()

        def recall() -> Tensor:
            return self._again(source, tensor=True)[1] if values is None else values

        def columns() -> Fp8Tensor:
            if values is not None:
                return quantize_columns(values, power_of_two=self.power_of_two)
            return rms_norm_columns(source, self.weight.detach(), inverse_rms, power_of_two=self.power_of_two)

        def rows_again() -> Fp8Tensor:
            if values is not None:
                return quantize_rows(values, power_of_two=self.power_of_two)
            return self._again(source, tensor=False)[2]

        return h, Normed(y, recall, ReadyCast(rows, columns, rows_again, self.power_of_two) if self.rows else None)

    def _again(self, x: Tensor, *, tensor: bool) -> tuple[Tensor, Tensor, Fp8Tensor, Tensor]:
        """What the forward made of x: y, or the rows alone."""
        weight, power_of_two = self.weight.detach(), self.power_of_two
        return rms_norm(x, weight, eps=self.eps, tensor=tensor, rows=not tensor, power_of_two=power_of_two)


_Made = tuple[Tensor, Tensor, Fp8Tensor]  # what was normed, its 1/rms, its rows


class _RMSNormFunction(torch.autograd.Function):
    """(x, delta) -> (h, y), h where it has a use beside the norm; `made` takes what autograd cannot carry."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, entry: Tensor | None, norm: RMSNorm, made: list[_Made],
        residual: bool,
    ) -> tuple[Tensor | None, Tensor]:  # fmt: skip
        h, y, rows, inverse_rms = rms_norm(
            x, norm.weight.detach(), delta, eps=norm.eps, tensor=norm.tensor, rows=norm.rows,
            power_of_two=norm.power_of_two,
        )  # fmt: skip
        h = x if delta is None else h
        ctx.save_for_backward(h, inverse_rms)
        ctx.norm = norm
        ctx.set_materialize_grads(False)
        made.append((h.detach(), inverse_rms, rows))
        return h if residual else None, y if norm.tensor else placeholder(x.shape, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dh, dy = grads
        dx = dh
        if dy is not None:
            h, inverse_rms = ctx.saved_tensors
            weight = ctx.norm.weight
            dx = rms_norm_backward(dy, h, weight.detach(), inverse_rms, weight.main_grad, dh)
        return dx, dx if ctx.needs_input_grad[1] else None, *(None,) * 4
