"""A bias [N] added to the rows of a product, with its FP32 gradient.

The product is rounded to its dtype before the bias is added, in that dtype: two roundings in BF16. Refused: a bias
inside the FP8 product, which one family of models needs in two of its Linears and no kernel of this repository takes.
The gradient is summed over tokens in FP32 when the backward passes, so that a waiting weight gradient holds N numbers
and not the gradient of all rows, and is added into `main_grad` with the weight gradients (`layers.phase.submit`).

Legend: T tokens, N features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fp8moe.layers.phase import submit
from fp8moe.layers.recipe import Recipe


def make_bias(features: int, recipe: Recipe) -> nn.Parameter:
    """An uninitialised bias [features] in the recipe's dtype; `init_weights` fills it with its initial value, zero."""
    bias = nn.Parameter(torch.empty(features, dtype=recipe.dtype))
    bias.initial_value = 0.0  # type: ignore[attr-defined]
    return bias


def add_bias(y_TN: Tensor, bias_N: Tensor) -> Tensor:
    """y [T, N] + bias [N], written into y, which must be a product that nobody else keeps."""
    return _BiasFunction.apply(y_TN, bias_N)


class _BiasFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_TN: Tensor, bias_N: Tensor) -> Tensor:
        ctx.bias = bias_N
        ctx.mark_dirty(y_TN)
        return y_TN.add_(bias_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        main_grad: Tensor = ctx.bias.main_grad
        total_N = grads[0].sum(0, dtype=torch.float32)
        submit(lambda: add_total(main_grad, total_N))
        return grads[0], None


def add_total(main_grad: Tensor, total: Tensor) -> None:
    """main_grad (FP32) += total, for `submit`."""
    main_grad += total
