"""Biases of experts on rows grouped by expert: added after a product, and their gradients in backward.

The down projection's bias is multiplied by the routing weight, as its product is: y_r += weight_r * bias[expert of r].
In FP8 the bias of gate and up enters `swiglu` instead; in BF16 and FP32 it is added here, without weights. Numerics:
FP32 inside, one rounding to the dtype of y. The gradient of a bias is the FP32 sum of its group's rows in a fixed
order, added into FP32 `main_grad`; FP8 gradients are read as columns, the cast that the weight's gradient has as well.

Padding rows get weight x bias: 0 where their weight is 0 (`select_weights`), and nobody reads them.
"""

import torch
from torch import Tensor

from fp8moe.kernels import backend
from fp8moe.kernels.fp8 import TILE, Fp8Tensor, Rows, check_groups, check_total

DTYPES = (torch.bfloat16, torch.float32)


def add_expert_bias(y: Tensor, bias: Tensor, group_offsets: Tensor, weights: Tensor | None = None) -> None:
    """y [R, N] BF16 or FP32, contiguous, in place += weights [R] FP32 (None: 1) x bias [E, N] of the row's group.

    group_offsets: int32 [E+1]; groups start anywhere, rows past the last are left. Raises ValueError for other shapes
    or dtypes.
    """
    _check_rows(y, y.shape, bias, group_offsets, weights)
    if not y.is_contiguous():
        raise ValueError(f"add_expert_bias changes a contiguous y, got strides {list(y.stride())}: pass the product")
    backend.op("add_expert_bias")(y, bias, group_offsets, weights)


def expert_bias_dgrad(dy: Rows, bias: Tensor, group_offsets: Tensor, d_weights: Tensor) -> None:
    """d_weights [R] FP32 += sum over N of dy [R, N] x bias [E, N] of the row's group.

    dy: BF16, FP32 or FP8 rows; rows past the last group are left. Raises ValueError for other shapes or dtypes.
    """
    data = dy.data if isinstance(dy, Fp8Tensor) else dy
    _check_rows(None if isinstance(dy, Fp8Tensor) else dy, data.shape, bias, group_offsets, None)
    check_total(d_weights, (data.shape[0],))
    backend.op("expert_bias_dgrad")(dy, bias, group_offsets, d_weights)


def expert_bias_wgrad(dy: Rows, group_offsets: Tensor, main_grad: Tensor, weights: Tensor | None = None) -> None:
    """main_grad [E, N] FP32 += for each group the sum over its rows of weights [R] x dy.

    dy: FP8 columns [N, R], groups on multiples of 128, or dy [R, N] BF16 or FP32 and groups anywhere. A group
    without rows leaves its row of main_grad untouched. Raises ValueError for other shapes or dtypes.
    """
    fp8 = isinstance(dy, Fp8Tensor)
    r, n = dy.shape[::-1] if fp8 else dy.shape
    if isinstance(dy, Tensor) and dy.dtype not in DTYPES:
        raise ValueError(f"expert_bias_wgrad takes BF16, FP32 or FP8 columns, not {dy.dtype}: cast it")
    check_total(main_grad, (len(main_grad), n))
    if not main_grad.is_contiguous():
        raise ValueError(f"main_grad must be contiguous, got strides {list(main_grad.stride())}: use the bias's")
    check_groups(group_offsets, len(main_grad), r, TILE if fp8 else 1)
    _check_weights(weights, r)
    backend.op("expert_bias_wgrad")(dy, group_offsets, main_grad, weights)


def _check_rows(
    x: Tensor | None, shape: torch.Size, bias: Tensor, group_offsets: Tensor, weights: Tensor | None
) -> None:
    if len(shape) != 2 or (x is not None and x.dtype not in DTYPES):
        raise ValueError(
            f"a bias of experts takes rows [R, N] in BF16 or FP32, not {list(shape)} {'' if x is None else x.dtype}: "
            "flatten and cast them"
        )
    r, n = shape
    if bias.dim() != 2 or bias.shape[1] != n or bias.dtype not in DTYPES:
        raise ValueError(
            f"bias must be [E, {n}] in BF16 or FP32, not {list(bias.shape)} {bias.dtype}: give one row an expert"
        )
    check_groups(group_offsets, len(bias), r, 1)
    _check_weights(weights, r)


def _check_weights(weights: Tensor | None, r: int) -> None:
    if weights is not None and (weights.shape != (r,) or weights.dtype is not torch.float32):
        raise ValueError(
            f"routing weights must be FP32 [{r}], one a row, got {list(weights.shape)} {weights.dtype}: cast them"
        )
