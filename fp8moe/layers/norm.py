"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, statistics in FP32, output in the dtype of x.

Under recomputation only x is kept: backward runs the norm again for its own gradient, and whoever needs y there recalls
it. That is at most twice where Wgrad waits; keeping y from one to the other was refused, it is the memory to be saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fp8moe.layers.recipe import Recipe, Recompute
from fp8moe.layers.recompute import Recallable, kept


class RMSNorm(nn.Module):
    """x [T, D] -> [T, D]; `weight` [D], ones at first."""

    def __init__(self, dim: int, recipe: Recipe, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.recompute = Recompute.NORM in recipe.recompute
        self.weight = nn.Parameter(torch.ones(dim, dtype=recipe.dtype))

    def forward(self, x: Tensor) -> Recallable:
        if not self.recompute:
            # PyTorch's norm may be made of several steps; the view lets their gradients of x be summed by themselves
            # before others join, as in the function below.
            return kept(_rms_norm(x.view_as(x), self.weight, self.eps))
        y = _RMSNormFunction.apply(x, self.weight, self.eps)
        x = x.detach()
        return Recallable(y, lambda: self._recompute(x))

    @torch.no_grad()
    def _recompute(self, x: Tensor) -> Tensor:
        return _rms_norm(x, self.weight, self.eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return nn.functional.rms_norm(x, weight.shape, weight, eps)


class _RMSNormFunction(torch.autograd.Function):
    """Keeps x alone; PyTorch's own norm keeps statistics as well, and on a CPU two FP32 copies of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            y = _rms_norm(x, weight, ctx.eps)
        dx, dweight = torch.autograd.grad(y, (x, weight), grads[0])
        return dx, dweight, None
