"""SwiGLU fused with quantization: what the down projection eats, and what backward needs, in one pass each.

h = silu(gate) * up * weight, with gate and up side by side in one tensor. The routing weight is applied here, once, so
that combine is a plain sum. Numerics: arithmetic in FP32, one rounding at the cast.

Memory: the input is kept in FP8 and the output is recomputed from it in backward (DeepSeek-V3 report, section 3.2.3 and
3.3.3). Keeping h instead was refused: backward needs gate and up anyway. The recomputed h differs from the forward's by
the rounding of the cached copy; columns made of it have power-of-two scales.

Padding rows must be zero (as `permute` makes them): a tile of columns covers padding and tokens of one group together.
"""

import torch
from torch import Tensor

from fp8moe.kernels import backend
from fp8moe.kernels.fp8 import ROW_TILE, Fp8Tensor, check_sizes


def swiglu(
    gate_up: Tensor, weights: Tensor | None = None, *, power_of_two: bool = False
) -> tuple[Fp8Tensor, Fp8Tensor]:
    """gate_up [R, 2F] BF16 or FP32, weights [R] FP32 -> (rows [R, F] of h, rows [R, 2F] of gate_up for backward).

    F is a multiple of 16. Raises ValueError for other shapes or dtypes.
    """
    if gate_up.dim() != 2 or gate_up.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"swiglu takes [R, 2F] in BF16 or FP32, not {list(gate_up.shape)} {gate_up.dtype}: flatten and cast it"
        )
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate and up must be equally wide, 2F={gate_up.shape[1]} is odd: use {gate_up.shape[1] + 1}")
    check_sizes(F=gate_up.shape[1] // 2)
    _check_weights(weights, gate_up.shape[0])
    return backend.op("swiglu")(gate_up, weights, power_of_two=power_of_two)


def swiglu_columns(cached: Fp8Tensor, weights: Tensor | None = None) -> Fp8Tensor:
    """cached rows [R, 2F] from `swiglu`, weights [R] FP32 -> columns [F, R] of the recomputed h, for the down Wgrad.

    Scales are powers of two; R is a multiple of 16. Raises ValueError for other tiles or shapes.
    """
    _check_cached(cached)
    check_sizes(R=cached.shape[0])
    _check_weights(weights, cached.shape[0])
    return backend.op("swiglu_columns")(cached, weights)


def swiglu_backward(
    dy: Tensor, cached: Fp8Tensor, weights: Tensor | None = None, *, power_of_two: bool = False
) -> tuple[Fp8Tensor, Fp8Tensor, Tensor | None]:
    """dy [R, F] BF16 or FP32, cached rows [R, 2F] -> (d gate_up rows [R, 2F], its columns [2F, R], d weights [R]).

    amax is clamped at the gradient floor. d weights is FP32, None without weights. R is a multiple of 16.
    Raises ValueError for other tiles, shapes or dtypes.
    """
    _check_cached(cached)
    r, both = cached.shape
    if dy.shape != (r, both // 2) or dy.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"swiglu_backward takes dy [{r}, {both // 2}] in BF16 or FP32, not {list(dy.shape)} {dy.dtype}: "
            "pass the gradient of the same rows"
        )
    check_sizes(R=r)
    _check_weights(weights, r)
    return backend.op("swiglu_backward")(dy, cached, weights, power_of_two=power_of_two)


def _check_cached(cached: Fp8Tensor) -> None:
    if cached.tile != ROW_TILE or len(cached.shape) != 2 or cached.shape[1] % 2:
        raise ValueError(
            f"the cached input must be [R, 2F] of {ROW_TILE} tiles, got {list(cached.shape)} of {cached.tile}: "
            "pass what swiglu returned"
        )


def _check_weights(weights: Tensor | None, r: int) -> None:
    if weights is not None and (weights.shape != (r,) or weights.dtype is not torch.float32):
        raise ValueError(
            f"routing weights must be FP32 [{r}], one a row, got {list(weights.shape)} {weights.dtype}: cast them"
        )
