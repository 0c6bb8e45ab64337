"""SwiGLU fused with quantization: what the down projection eats, and what backward needs, in one pass each.

h = silu(gate) * up * weight, with gate and up side by side in one tensor. The routing weight is applied here, once, so
that combine is a plain sum. Numerics: arithmetic in FP32, one rounding at the cast.

Memory: the input is kept in FP8 and the output is recomputed from it in backward (DeepSeek-V3 report, section 3.2.3 and
3.3.3). Keeping h instead was refused: backward needs gate and up anyway. The recomputed h differs from the forward's by
the rounding of the cached copy; columns made of it have power-of-two scales.

Padding rows must be zero (as `permute` makes them): a tile of columns covers padding and tokens of one group together.

Two variants, of GPT-OSS: `limit` makes it g * sigmoid(1.702 g) * (u + 1) with g = min(gate, limit) and u = up within
+-limit; `bias` adds each expert's own to gate and up first, in FP32. The cached copy has the bias in it, unclamped: the
other ops know the limit alone. A padding row is then its expert's bias, so its weight must be zero (`select_weights`).
"""

import torch
from torch import Tensor

from fp8moe.kernels import backend
from fp8moe.kernels.fp8 import ROW_TILE, TILE, Fp8Tensor, check_groups, check_limit, check_sizes


def swiglu(
    gate_up: Tensor,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    group_offsets: Tensor | None = None,
    *,
    limit: float | None = None,
    power_of_two: bool = False,
) -> tuple[Fp8Tensor, Fp8Tensor]:
    """gate_up [R, 2F] BF16 or FP32, weights [R] FP32 -> (rows [R, F] of h, rows [R, 2F] of gate_up for backward).

    bias: [E, 2F] BF16 or FP32, of the groups of rows that `group_offsets` (int32 [E+1], multiples of 128) bound; both
    or none. limit: of the clamped activation, None for plain SwiGLU. F is a multiple of 16. Raises ValueError for other
    shapes or dtypes.
    """
    if gate_up.dim() != 2 or gate_up.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"swiglu takes [R, 2F] in BF16 or FP32, not {list(gate_up.shape)} {gate_up.dtype}: flatten and cast it"
        )
    r, both = gate_up.shape
    if both % 2:
        raise ValueError(f"gate and up must be equally wide, 2F={both} is odd: use {both + 1}")
    check_sizes(F=both // 2)
    _check_weights(weights, r)
    check_limit(limit)
    if bias is not None or group_offsets is not None:
        _check_bias(bias, group_offsets, gate_up)
    return backend.op("swiglu")(gate_up, weights, bias, group_offsets, limit=limit, power_of_two=power_of_two)


def swiglu_columns(cached: Fp8Tensor, weights: Tensor | None = None, *, limit: float | None = None) -> Fp8Tensor:
    """cached rows [R, 2F] from `swiglu`, weights [R] FP32 -> columns [F, R] of the recomputed h, for the down Wgrad.

    Scales are powers of two; R is a multiple of 16. Raises ValueError for other tiles or shapes.
    """
    r, _ = _check_cached(cached)
    check_sizes(R=r)
    _check_weights(weights, r)
    check_limit(limit)
    return backend.op("swiglu_columns")(cached, weights, limit=limit)


def swiglu_backward(
    dy: Tensor,
    cached: Fp8Tensor,
    weights: Tensor | None = None,
    *,
    limit: float | None = None,
    power_of_two: bool = False,
) -> tuple[Fp8Tensor, Fp8Tensor, Tensor | None]:
    """dy [R, F] BF16 or FP32, cached rows [R, 2F] -> (d gate_up rows [R, 2F], its columns [2F, R], d weights [R]).

    amax is clamped at the gradient floor. d weights is FP32, None without weights. R is a multiple of 16.
    Raises ValueError for other tiles, shapes or dtypes.
    """
    r, both = _check_cached(cached)
    if dy.shape != (r, both // 2) or dy.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"swiglu_backward takes dy [{r}, {both // 2}] in BF16 or FP32, not {list(dy.shape)} {dy.dtype}: "
            "pass the gradient of the same rows"
        )
    check_sizes(R=r)
    _check_weights(weights, r)
    check_limit(limit)
    return backend.op("swiglu_backward")(dy, cached, weights, limit=limit, power_of_two=power_of_two)


def _check_bias(bias: Tensor | None, group_offsets: Tensor | None, gate_up: Tensor) -> None:
    if bias is None or group_offsets is None:
        raise ValueError("swiglu takes bias and group_offsets together, one of them is None: pass both or none")
    both = gate_up.shape[1]
    if bias.dim() != 2 or bias.shape[1] != both or bias.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"bias must be [E, {both}] in BF16 or FP32, not {list(bias.shape)} {bias.dtype}: give one row an expert"
        )
    check_groups(group_offsets, len(bias), gate_up.shape[0], TILE)


def _check_cached(cached: Fp8Tensor) -> torch.Size:
    shape = cached.data.shape
    if cached.tile != ROW_TILE or len(shape) != 2 or shape[1] % 2:
        raise ValueError(
            f"the cached input must be [R, 2F] of {ROW_TILE} tiles, got {list(shape)} of {cached.tile}: "
            "pass what swiglu returned"
        )
    return shape


def _check_weights(weights: Tensor | None, r: int) -> None:
    if weights is not None and (weights.shape != (r,) or weights.dtype is not torch.float32):
        raise ValueError(
            f"routing weights must be FP32 [{r}], one a row, got {list(weights.shape)} {weights.dtype}: cast them"
        )
