"""E5M6 in Triton: 12-bit packing and unpacking in registers, and the cast straight on to FP8 columns.

To pack, a tile of [BLOCK_M, 128] values is seen as [BLOCK_M, 16, 8]: each run of 8 values becomes 3 words, each word a
sum of shifted codes whose bits don't overlap. `e5m6_to_columns` never writes the unpacked values to memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR, E5M6_VALUES, E5M6_WORDS, TILE, E5m6Tensor, Fp8Tensor, ceil_div
from fp8moe.kernels.triton import encode
from fp8moe.kernels.triton.gemm import TL_DTYPE
from fp8moe.kernels.triton.launch import launch
from fp8moe.kernels.triton.layout import empty_columns, empty_scales
from fp8moe.kernels.triton.quantize import BOTH_WARPS, COLUMNS_BLOCK_K, last_dim_contiguous, write_columns

BLOCK_M = 32
NUM_WARPS = 4
E5M6_MAX = tl.constexpr(65024.0)
RUNS = tl.constexpr(16)  # of 8 values in a tile of 128


@triton.jit
def word_of(codes, WORD: tl.constexpr):
    """Word WORD of each run: codes [M, 16, 8] int32 -> [M, 16]."""
    shift = 12 * tl.arange(0, 8)[None, None, :] - 32 * WORD
    left = tl.where((shift >= 0) & (shift < 32), codes << tl.maximum(tl.minimum(shift, 31), 0), 0)
    right = tl.where((shift < 0) & (shift > -12), codes >> tl.minimum(tl.maximum(-shift, 0), 31), 0)
    return tl.sum(left | right, axis=2)


@triton.jit
def pack_kernel(x, words, scales, M, K, stride_m, floor, BLOCK_M: tl.constexpr):
    """x [M, K] -> words [M, 3 K / 8], scales [ceil(K/128), M]."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * encode.TILE + tl.arange(0, encode.TILE)
    mask = (m < M)[:, None] & (k < K)[None, :]
    value = tl.load(x + m.to(tl.int64)[:, None] * stride_m + k[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = encode.scale_of(tl.max(encode.magnitude_bits(value), axis=1), floor, E5M6_MAX, True)
    tl.store(scales + tl.program_id(1).to(tl.int64) * M + m, scale, mask=m < M)
    value = encode.round_to_grid(value * encode.inverse_of(scale)[:, None], E5M6_MAX, 17, 2.0**-14, 12.0)
    half = value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    codes = tl.reshape((half >> 4) & 0xFFF, (BLOCK_M, RUNS, 8))
    run = tl.program_id(1) * RUNS + tl.arange(0, RUNS)
    here = words + m.to(tl.int64)[:, None] * (K // 8 * 3) + run[None, :] * 3
    run_mask = (m < M)[:, None] & (run < K // 8)[None, :]
    tl.store(here, word_of(codes, 0), mask=run_mask)
    tl.store(here + 1, word_of(codes, 1), mask=run_mask)
    tl.store(here + 2, word_of(codes, 2), mask=run_mask)


@triton.jit
def load_values(words, scales, m, k, k_tile, M, K, stride_m, scale_stride_m, scale_stride_k):
    """The values at rows m and columns k of scale tile k_tile, FP32; zero outside [M, K].

    m and k span the tile, one along each dim: [BLOCK, 1] and [1, BLOCK] in either order. Each value gathers the one or
    two words its bits lie in: neighbours share them, so it is the first-level cache that pays. Loading each word once
    and spreading it over a run was refused: 128x128 values then spill registers.
    """
    bit = 12 * (k % 8)
    shift = bit % 32
    here = words + m.to(tl.int64) * stride_m + (k // 8 * 3 + bit // 32)
    mask = (m < M) & (k < K)
    low = tl.load(here, mask=mask, other=0)
    high = tl.load(here + 1, mask=mask & (shift > 20), other=0)
    # Words are signed: a right shift drags the sign in from above, and what it drags in beyond bit 32 is masked away.
    kept = tl.where(shift > 20, (1 << (32 - tl.maximum(shift, 20))) - 1, 0xFFF)
    code = (((low >> shift) & kept) | (high << (32 - tl.maximum(shift, 20)))) & 0xFFF
    half = (code << 4).to(tl.int16).to(tl.float16, bitcast=True)
    where = scales + m.to(tl.int64) * scale_stride_m + k_tile.to(tl.int64) * scale_stride_k
    return half.to(tl.float32) * tl.load(where, mask=m < M, other=1.0)


@triton.jit
def unpack_kernel(
    words, scales, out, M, K, stride_m, scale_stride_m, scale_stride_k, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr
):
    """words [M, 3 K / 8] -> out [M, K]."""
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    k = (tl.program_id(1) * encode.TILE + tl.arange(0, encode.TILE))[None, :]
    value = load_values(words, scales, m, k, tl.program_id(1), M, K, stride_m, scale_stride_m, scale_stride_k)
    tl.store(out + m.to(tl.int64) * K + k, encode.to_output(value, DTYPE), mask=(m < M) & (k < K))


@triton.jit
def e5m6_columns_kernel(
    words, scales, columns, columns_scale, M, K, stride_m, scale_stride_m, scale_stride_k, floor, BLOCK_K: tl.constexpr
):
    """words [M, 3 K / 8] -> FP8 columns [K, M], scales powers of two."""
    m = tl.program_id(0) * encode.TILE + tl.arange(0, encode.TILE)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_tile = tl.program_id(1) * BLOCK_K // encode.TILE
    value = load_values(words, scales, m[None, :], k[:, None], k_tile, M, K, stride_m, scale_stride_m, scale_stride_k)
    write_columns(value, columns, columns_scale, m, k, M, K, floor, True)


def pack_e5m6(x: Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR) -> E5m6Tensor:
    flat = last_dim_contiguous(x.flatten(0, -2))
    m, k = flat.shape
    num_words = k // E5M6_VALUES * E5M6_WORDS
    words = torch.empty(m, num_words, dtype=torch.int32, device=x.device)
    scale = empty_scales(m, k, x.device)
    if flat.numel():
        launch(
            pack_kernel,
            (ceil_div(m, BLOCK_M), ceil_div(k, TILE)),
            flat,
            words,
            scale,
            m,
            k,
            flat.stride(0),
            amax_floor,
            BLOCK_M=BLOCK_M,
            num_warps=NUM_WARPS,
        )
    lead = x.shape[:-1]
    return E5m6Tensor(words.view(*lead, num_words), scale.reshape(*lead, ceil_div(k, TILE)))


def unpack_e5m6(packed: E5m6Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    out = torch.empty(packed.shape, dtype=dtype, device=packed.device)
    words, scale = last_dim_contiguous(packed.data.flatten(0, -2)), packed.scale.flatten(0, -2)
    m, k = words.shape[0], packed.shape[-1]
    if out.numel():
        launch(
            unpack_kernel, (ceil_div(m, BLOCK_M), ceil_div(k, TILE)),
            words, scale, out, m, k, words.stride(0), *scale.stride(), DTYPE=TL_DTYPE[dtype], BLOCK_M=BLOCK_M,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


def e5m6_to_columns(packed: E5m6Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR) -> Fp8Tensor:
    m, k = packed.shape
    columns = empty_columns(m, k, packed.device)
    words = last_dim_contiguous(packed.data)
    if words.numel():
        launch(
            e5m6_columns_kernel, (ceil_div(m, TILE), ceil_div(k, COLUMNS_BLOCK_K)),
            words, packed.scale, columns.data, columns.scale, m, k, words.stride(0), *packed.scale.stride(),
            amax_floor, BLOCK_K=COLUMNS_BLOCK_K, num_warps=BOTH_WARPS,
        )  # fmt: skip
    return columns
