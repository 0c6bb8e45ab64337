"""SwiGLU without casts, for BF16 and FP32 training: silu(gate) * up * weight, forward and backward.

The unquantized kin of `swiglu`, as `grouped_mm` is of `grouped_gemm`: gate and up side by side in one tensor, the
routing weight applied here, once; `limit` clamps as it does there. Numerics: arithmetic in FP32, one rounding to the
dtype of the input.
"""

import torch
from torch import Tensor

from fp8moe.kernels import backend
from fp8moe.kernels.fp8 import check_limit

DTYPES = (torch.bfloat16, torch.float32)


def silu_mul(gate_up: Tensor, weights: Tensor | None = None, *, limit: float | None = None) -> Tensor:
    """gate_up [R, 2F] BF16 or FP32, weights [R] FP32 -> silu(gate) * up * weight [R, F] of its dtype.

    Raises ValueError for other shapes or dtypes.
    """
    _check(gate_up, weights)
    check_limit(limit)
    out: Tensor = backend.op("silu_mul")(gate_up, weights, limit=limit)
    return out


def silu_mul_backward(
    dy: Tensor, gate_up: Tensor, weights: Tensor | None = None, *, limit: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """dy [R, F] BF16 or FP32, gate_up [R, 2F] -> (d gate_up [R, 2F] of its dtype, d weights [R] FP32).

    d weights is None without weights. Raises ValueError for other shapes or dtypes.
    """
    _check(gate_up, weights)
    check_limit(limit)
    r, both = gate_up.shape
    if dy.shape != (r, both // 2) or dy.dtype not in DTYPES:
        raise ValueError(
            f"silu_mul_backward takes dy [{r}, {both // 2}] in BF16 or FP32, not {list(dy.shape)} {dy.dtype}: "
            "pass the gradient of the same rows"
        )
    grads: tuple[Tensor, Tensor | None] = backend.op("silu_mul_backward")(dy, gate_up, weights, limit=limit)
    return grads


def _check(gate_up: Tensor, weights: Tensor | None) -> None:
    if gate_up.dim() != 2 or gate_up.dtype not in DTYPES:
        raise ValueError(
            f"silu_mul takes gate_up [R, 2F] in BF16 or FP32, not {list(gate_up.shape)} {gate_up.dtype}: "
            "flatten and cast it"
        )
    r, both = gate_up.shape
    if both % 2:
        raise ValueError(f"gate and up must be equally wide, 2F={both} is odd: use {both + 1}")
    if weights is not None and (weights.shape != (r,) or weights.dtype is not torch.float32):
        raise ValueError(
            f"routing weights must be FP32 [{r}], one a row, got {list(weights.shape)} {weights.dtype}: cast them"
        )
