"""Quantization in Triton: rows, columns, both in one pass, blocks in both orientations, FP8 rows to columns.

One program casts one tile: [32, 128] as rows, [128, 64] as columns, 128x128 as both or as a block. Columns are
contiguous along tokens, because an FP8 tensor core reads K-major bytes only: `columns` says how a program holds them. A
second pass that transposes codes was refused, it reads and writes everything once more. Programs along M come first in
the grid, so that neighbours share the same columns of scales.

A cast feeds one store, and what is cast in both orientations is loaded twice, from HBM and again from L1 or L2. Codes
stored both as they are and transposed came out wrong on an H100, whether transposed by `tl.trans` or by the addresses,
as bytes or before the cast (ptxas 12.8 merges the casts of both; triton-lang/triton issue 11111). Rows of a 128x128
tile are cast 32 at a time and its columns 64 at a time, in loops: at once they took twice the threads, and two thirds
more instructions a value.

The formula is the specification's, bit for bit (see `encode`).
"""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.device_layout import empty_blocks, empty_columns, empty_rows
from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR, TILE, Fp8Tensor, ceil_div
from fp8moe.kernels.triton import encode
from fp8moe.kernels.triton.columns import (
    cast_columns,
    column_block,
    load_factors,
    load_tokens,
    quarter_stride,
    scale_at,
)
from fp8moe.kernels.triton.launch import Prepared, by_shapes, launch

ROWS_BLOCK_M = 32  # rows a program casts when it writes no columns
COLUMNS_BLOCK_K = 64  # columns a program casts when it writes no rows
NUM_WARPS = 4
BOTH_WARPS = 8  # of a program that writes both orientations


@triton.jit
def cast_rows(x, codes, scales, m, k, tile, M, K, floor, POWER_OF_TWO: tl.constexpr):
    """x [BLOCK_M, 128] FP32 at rows m, columns k of scale tile `tile` -> codes [M, K], scales [ceil(K/128), M]."""
    scale = encode.e4m3_scale_of(encode.amax_bits(x, 1), floor, POWER_OF_TWO)
    code = encode.to_e4m3_words(x * encode.inverse_of_scale(scale, POWER_OF_TWO)[:, None])
    tl.store(codes + m.to(tl.int64)[:, None] * K + k[None, :], code, mask=(m < M)[:, None] & (k < K)[None, :])
    tl.store(scales + tl.cast(tile, tl.int64) * M + m, scale, mask=m < M)


@triton.jit
def write_columns(x, codes, scales, m, k, M, K, floor, POWER_OF_TWO: tl.constexpr):
    """x [BLOCK_K, 128] FP32 at columns k, rows m -> codes [K, M], scales [ceil(M/128), K]."""
    bits = tl.max(encode.magnitude_bits(x), axis=1)
    scale = encode.scale_of(bits, floor, encode.E4M3_MAX, POWER_OF_TWO)
    code = encode.to_e4m3(x * encode.inverse_of(scale)[:, None])
    mask = (k < K)[:, None] & (m < M)[None, :]
    tl.store(codes + k.to(tl.int64)[:, None] * M + m[None, :], code, mask=mask)
    tl.store(scales + tl.program_id(0).to(tl.int64) * K + k, scale, mask=k < K)


@triton.jit(do_not_specialize=["quarter_m"])
def tiles_kernel(
    x, rows, rows_scale, columns, columns_scale, M, K, stride_m, quarter_m, floor, POWER_OF_TWO: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """x [M, K] -> rows [BLOCK_M, 128] at a time, columns [128, BLOCK_K] at a time, or a tile of 128x128 as both."""
    if ROWS:
        tile = tl.program_id(1)
        k = tile * encode.TILE + tl.arange(0, encode.TILE)
        row_blocks: tl.constexpr = encode.TILE // BLOCK_M if COLUMNS else 1
        for i in range(row_blocks):
            m = (tl.program_id(0) * row_blocks + i) * BLOCK_M + tl.arange(0, BLOCK_M)
            mask = (m < M)[:, None] & (k < K)[None, :]
            value = tl.load(x + m.to(tl.int64)[:, None] * stride_m + k[None, :], mask=mask, other=0.0)
            cast_rows(value.to(tl.float32), rows, rows_scale, m, k, tile, M, K, floor, POWER_OF_TWO)
    if COLUMNS:
        block = tl.program_id(0)
        column_blocks: tl.constexpr = encode.TILE // BLOCK_K if ROWS else 1
        for i in range(column_blocks):
            first = (tl.program_id(1) * column_blocks + i) * BLOCK_K
            value = load_tokens(x, block, first + tl.arange(0, BLOCK_K), quarter_m, M, K, OWN)
            cast_columns(value, columns, columns_scale, block, first, M, K, K, floor, POWER_OF_TWO, OWN)


@triton.jit
def write_blocks(
    w, codes, scales, transposed, transposed_scales, N, K, stride_e, stride_n, floor, POWER_OF_TWO: tl.constexpr
):
    """This program's block of w [E, N, K] -> codes [E, N, K], their bytes transposed [E, K, N], its scale in both."""
    n_tile, k_tile, e = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = n_tile * encode.TILE + tl.arange(0, encode.TILE)
    k = k_tile * encode.TILE + tl.arange(0, encode.TILE)
    mask = (n < N)[:, None] & (k < K)[None, :]
    source = w + e * stride_e + n.to(tl.int64)[:, None] * stride_n + k[None, :]
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    bits = tl.max(tl.max(encode.magnitude_bits(value), axis=1, keep_dims=True), axis=0, keep_dims=True)
    scale = encode.scale_of(bits, floor, encode.E4M3_MAX, POWER_OF_TWO)
    inverse = encode.inverse_of(scale)
    base = e * N * K
    code = encode.to_e4m3(value * inverse)
    tl.store(codes + base + n.to(tl.int64)[:, None] * K + k[None, :], code, mask=mask)
    mask = (k < K)[:, None] & (n < N)[None, :]
    source = w + e * stride_e + n.to(tl.int64)[None, :] * stride_n + k[:, None]
    again = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    tl.store(transposed + base + k.to(tl.int64)[:, None] * N + n[None, :], encode.to_e4m3(again * inverse), mask=mask)
    num_n, num_k = tl.cdiv(N, encode.TILE), tl.cdiv(K, encode.TILE)
    here = e * num_n * num_k
    one = tl.arange(0, 1)[:, None] + tl.arange(0, 1)[None, :]
    tl.store(scales + here + n_tile * num_k + k_tile + one, scale)
    tl.store(transposed_scales + here + k_tile * num_n + n_tile + one, scale)


@triton.jit
def blocks_kernel(
    w, codes, scales, transposed, transposed_scales, N, K, stride_e, stride_n, floor, POWER_OF_TWO: tl.constexpr
):
    """w [E, N, K] -> codes [E, N, K], their bytes transposed [E, K, N], one scale a 128x128 block in both orders."""
    write_blocks(w, codes, scales, transposed, transposed_scales, N, K, stride_e, stride_n, floor, POWER_OF_TWO)


@triton.jit(do_not_specialize=["quarter_m", "scale_stride_k"])
def requantize_kernel(
    codes, scales, columns, columns_scale, M, K, quarter_m, scale_stride_m, scale_stride_k, floor,
    BLOCK_K: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """FP8 rows [M, K] -> columns, scales powers of two: decoded and cast without leaving the registers."""
    block, first = tl.program_id(0), tl.program_id(1) * BLOCK_K
    scale = load_factors(scales + scale_at(first, scale_stride_k), block, scale_stride_m, M, OWN)
    value = load_tokens(codes, block, first + tl.arange(0, BLOCK_K), quarter_m, M, K, OWN) * scale
    cast_columns(value, columns, columns_scale, block, first, M, K, K, floor, True, OWN)


def quantize_rows(x: Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR, power_of_two: bool = False) -> Fp8Tensor:
    flat = x if x.dim() == 2 else x.flatten(0, -2)
    m, k = flat.shape
    rows = empty_rows(m, k, x.device)
    _launch_tiles(flat, rows, None, amax_floor, power_of_two)
    if x.dim() == 2:
        return rows
    # Both are views: M-major scales have one stride over all leading dims.
    return Fp8Tensor(rows.data.view(x.shape), rows.scale.reshape(*x.shape[:-1], ceil_div(k, TILE)))


def quantize_columns(x: Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR, power_of_two: bool = False) -> Fp8Tensor:
    m, k = x.shape
    columns = empty_columns(m, k, x.device)
    _launch_tiles(x, None, columns, amax_floor, power_of_two)
    return columns


def quantize_rows_and_columns(
    x: Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR, power_of_two: bool = False
) -> tuple[Fp8Tensor, Fp8Tensor]:
    m, k = x.shape
    rows, columns = empty_rows(m, k, x.device), empty_columns(m, k, x.device)
    _launch_tiles(x, rows, columns, amax_floor, power_of_two)
    return rows, columns


def quantize_blocks(
    w: Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR, power_of_two: bool = False
) -> tuple[Fp8Tensor, Fp8Tensor]:
    n, k = w.shape[-2:]
    blocks = empty_blocks(tuple(w.shape), w.device)
    transposed = empty_blocks((*w.shape[:-2], k, n), w.device)
    stacked = last_dim_contiguous(w.reshape(-1, n, k) if w.numel() else w.new_empty(0, n, k))
    if stacked.numel():
        launch(
            blocks_kernel, (ceil_div(n, TILE), ceil_div(k, TILE), stacked.shape[0]),
            stacked, blocks.data, blocks.scale, transposed.data, transposed.scale, n, k, stacked.stride(0),
            stacked.stride(1), amax_floor, POWER_OF_TWO=power_of_two, num_warps=BOTH_WARPS,
        )  # fmt: skip
    return blocks, transposed


def requantize_columns(rows: Fp8Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR) -> Fp8Tensor:
    m, k = rows.shape
    columns = empty_columns(m, k, rows.device)
    if m and k:
        data, quarter = quarter_stride(rows.data)
        launch_on = _requantize_launch(m, k, quarter, rows.scale.stride(), amax_floor)
        launch_on(data, rows.scale, columns.data, columns.scale)
    return columns


@by_shapes
def _requantize_launch(m: int, k: int, quarter: int, scale_strides: tuple[int, ...], amax_floor: float) -> Prepared:
    block_k, own = column_block(k, COLUMNS_BLOCK_K, NUM_WARPS)
    return Prepared(
        requantize_kernel, (ceil_div(m, TILE), ceil_div(k, block_k)), m, k, quarter, *scale_strides,
        amax_floor, BLOCK_K=block_k, OWN=own, num_warps=NUM_WARPS,
    )  # fmt: skip


def last_dim_contiguous(x: Tensor) -> Tensor:
    """x itself where its last dim has stride 1, which the kernels count on; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch_tiles(
    x: Tensor, rows: Fp8Tensor | None, columns: Fp8Tensor | None, amax_floor: float, power_of_two: bool
) -> None:
    m, k = x.shape
    if m == 0 or k == 0:
        return
    x, quarter = (last_dim_contiguous(x), 0) if columns is None else quarter_stride(x)
    launch_on = _tiles_launch(
        m, k, x.stride(0), quarter, rows is not None, columns is not None, amax_floor, power_of_two
    )
    launch_on(
        x, *(_NOTHING if rows is None else (rows.data, rows.scale)),
        *(_NOTHING if columns is None else (columns.data, columns.scale)),
    )  # fmt: skip


_NOTHING = None, None


@by_shapes
def _tiles_launch(
    m: int, k: int, stride: int, quarter: int, rows: bool, columns: bool, amax_floor: float, power_of_two: bool
) -> Prepared:
    block_k, own = column_block(k if columns else TILE, COLUMNS_BLOCK_K, NUM_WARPS)
    return Prepared(
        tiles_kernel, (ceil_div(m, TILE if columns else ROWS_BLOCK_M), ceil_div(k, TILE if rows else block_k)),
        m, k, stride, quarter, amax_floor, POWER_OF_TWO=power_of_two, ROWS=rows, COLUMNS=columns, BLOCK_M=ROWS_BLOCK_M,
        BLOCK_K=block_k, OWN=own, num_warps=NUM_WARPS,
    )  # fmt: skip
