"""The token embedding, with an FP32 gradient: a frequent token sums thousands of rows, which BF16 would lose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fp8moe.layers.precision import Precision
from fp8moe.layers.wgrad import submit


class Embedding(nn.Module):
    """ids [T] int64 -> [T, dim]; `weight` [vocab_size, dim]; the gradient goes into `main_grad` directly."""

    def __init__(
        self, vocab_size: int, dim: int, *, precision: Precision, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim, dtype=precision.dtype, device=device))

    def forward(self, ids_T: Tensor) -> Tensor:
        return _EmbeddingFunction.apply(self.weight, ids_T)


class _EmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids_T: Tensor) -> Tensor:
        ctx.weight, ctx.ids_T = weight, ids_T
        return weight.detach()[ids_T]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        weight, ids_T, dy_TD = ctx.weight, ctx.ids_T, grads[0]
        submit(lambda: weight.main_grad.index_add_(0, ids_T, dy_TD.float()))
        return None, None
