"""Quantize to E4M3 by 1x128 tiles (activations, gradients) or 128x128 blocks (weights).

Numerics: amax is taken online; scale = max(amax, floor) / 448, rounded up to a power of two when asked; code = RNE(
clamp(x * (1 / scale))). Codes and scales are bit-equal on every back end. The floor keeps an empty tile's scale finite:
1e-4 for activations and weights, 1e-30 for gradients, which a loss averaged over millions of tokens makes so small that
1e-4 would turn nearly all of them to zero.

Layout: rows have tiles along the last dim (the contraction of Fprop and Dgrad); columns are the same for the transposed
matrix (the contraction of Wgrad, tokens). A tensor scaled by 1x128 can't be transposed without being quantized again,
one scaled by 128x128 can: so the weight is quantized once and written in both orientations, the gradient is quantized
twice in one pass, and a cached activation is requantized. 128x128 blocks for gradients were refused: they diverged at
16B parameters (DeepSeek-V3 report, section 3.3.2 and appendix B.2).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fp8moe.kernels import backend
from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR, ROW_TILE, Fp8Tensor, check_floor, check_sizes

# Called with (input, result, kind) of every cast here, the innermost alone; see `statistics.observe_casts`.
observers: list[Callable[[Tensor, Fp8Tensor, str], None]] = []
ACTIVATIONS, GRADIENTS, WEIGHTS = "activations", "gradients", "weights"  # the kinds of tensor that are cast


def _observe(x: Tensor, q: Fp8Tensor, amax_floor: float) -> None:
    """Gradients are known by their floor, which no activation has."""
    observers[-1](x, q, ACTIVATIONS if amax_floor >= ACTIVATION_AMAX_FLOOR else GRADIENTS)


def quantize_rows(x: Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR, power_of_two: bool = False) -> Fp8Tensor:
    """x [..., K] BF16 or FP32 -> rows [..., K] with 1x128 tiles along K, a multiple of 16.

    Raises ValueError for another dtype, fewer than two dims, another K, or an amax_floor below 1e-30.
    """
    _check_source(x, amax_floor)
    check_sizes(K=x.shape[-1])
    q = backend.op("quantize_rows")(x, amax_floor=amax_floor, power_of_two=power_of_two)
    if observers:
        _observe(x, q, amax_floor)
    return q


def quantize_columns(x: Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR, power_of_two: bool = False) -> Fp8Tensor:
    """x [M, K] BF16 or FP32 -> columns [K, M]: x transposed, with 1x128 tiles along M; both multiples of 16.

    Raises ValueError for another dtype or shape, or an amax_floor below 1e-30.
    """
    _check_matrix(x, amax_floor)
    q = backend.op("quantize_columns")(x, amax_floor=amax_floor, power_of_two=power_of_two)
    if observers:
        _observe(x.t(), q, amax_floor)
    return q


def quantize_rows_and_columns(
    x: Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR, power_of_two: bool = False
) -> tuple[Fp8Tensor, Fp8Tensor]:
    """x [M, K] -> (rows [M, K], columns [K, M]) in one pass: what a gradient needs for Dgrad and Wgrad.

    Raises ValueError as `quantize_columns` does.
    """
    _check_matrix(x, amax_floor)
    rows, columns = backend.op("quantize_rows_and_columns")(x, amax_floor=amax_floor, power_of_two=power_of_two)
    if observers:
        _observe(x, rows, amax_floor)
        _observe(x.t(), columns, amax_floor)
    return rows, columns


def quantize_blocks(
    w: Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR, power_of_two: bool = False
) -> tuple[Fp8Tensor, Fp8Tensor]:
    """w [..., N, K] BF16 or FP32 -> (w by 128x128 blocks, the same bytes transposed: w^T [..., K, N]).

    FP8 tensor cores take operands contiguous along the contraction, so Dgrad needs the transposed bytes physically.
    Raises ValueError for another dtype, fewer than two dims, N or K that is no multiple of 16, or such a floor.
    """
    _check_source(w, amax_floor)
    check_sizes(N=w.shape[-2], K=w.shape[-1])
    q, transposed = backend.op("quantize_blocks")(w, amax_floor=amax_floor, power_of_two=power_of_two)
    if observers:
        observers[-1](w, q, WEIGHTS)
    return q, transposed


def requantize_columns(rows: Fp8Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR) -> Fp8Tensor:
    """FP8 rows [M, K] -> columns [K, M], scales powers of two: the scale-aware transpose of what arrived in FP8.

    Where the rows' scales are powers of two as well, nearly every value survives exactly.
    Raises ValueError for another tile, more than two dims, sizes that are no multiples of 16, or such a floor.
    """
    shape = rows.data.shape
    if rows.tile != ROW_TILE or len(shape) != 2:
        raise ValueError(
            f"requantize_columns takes a matrix of {ROW_TILE} tiles, this one is {tuple(shape)} of {rows.tile}: "
            "quantize it by rows"
        )
    check_sizes(M=shape[0], K=shape[1])
    check_floor(amax_floor)
    return backend.op("requantize_columns")(rows, amax_floor=amax_floor)


def _check_source(x: Tensor, amax_floor: float) -> None:
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"quantizers take torch.bfloat16 or torch.float32, got {x.dtype}: cast it")
    if x.dim() < 2:
        raise ValueError(f"quantizers take at least 2 dims, got {x.dim()}: reshape it to [rows, K]")
    check_floor(amax_floor)


def _check_matrix(x: Tensor, amax_floor: float) -> None:
    _check_source(x, amax_floor)
    if x.dim() != 2:
        raise ValueError(f"columns are quantized from a matrix, got {x.dim()} dims: flatten it to [M, K]")
    m, k = x.shape
    check_sizes(M=m, K=k)
