"""E5M6 in Triton: 12-bit packing and unpacking in registers, and the cast straight on to FP8 columns.

A lane holds whole runs of 8 values and puts each into 3 words, or takes it from them. Words are loaded by three loads
of a run, 12 bytes apart: neighbours share sectors, which the first-level cache serves. They are not stored so. A warp
that writes a part of each sector three times over came to a fifth of a copy's bandwidth on an H100; words go through
shared memory first, as four of a run of which the last is dropped, and a warp writes 96 contiguous bytes, whole
sectors.

`e5m6_to_columns` never writes the unpacked values to memory, and holds them as `columns` does.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.device_layout import empty_columns, empty_scales
from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR, E5M6_VALUES, E5M6_WORDS, TILE, E5m6Tensor, Fp8Tensor, ceil_div
from fp8moe.kernels.triton import encode
from fp8moe.kernels.triton.columns import LANES, cast_columns, load_factors, scale_at, token_at
from fp8moe.kernels.triton.gemm import TL_DTYPE
from fp8moe.kernels.triton.launch import Prepared, by_shapes
from fp8moe.kernels.triton.quantize import COLUMNS_BLOCK_K, last_dim_contiguous

BLOCK_M = 32
NUM_WARPS = 4
E5M6_MAX_BITS = tl.constexpr(0x477E0000)
RUNS = tl.constexpr(16)  # of 8 values in a tile of 128


@triton.jit
def codes_of(x, scale):
    """FP32 x / scale, a power of two -> E5M6 codes [0, 4096) as int32, to nearest even; any where that is not finite.

    With p the power of two at or below |x|, at least the smallest normal number, the sum of p and |x| 2^-17 is rounded
    by FP32 to steps of p 2^-23, which are p 2^-6 of |x|: the format's. The mantissa of the sum is |x| in such steps,
    and since a carry counts one exponent more, mantissa and exponent of a code are added. Of the sum's own exponent,
    that of p, nothing is left below bit 11.
    """
    bits = x.to(tl.int32, bitcast=True)
    smallest = scale.to(tl.int32, bitcast=True) - (14 << 23)
    p = tl.maximum(bits & 0x7F800000, smallest)
    total = tl.fma(tl.abs(x), 2.0**-17, p.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    sign = (bits.to(tl.uint32, bitcast=True) >> 20).to(tl.int32, bitcast=True)
    code = total + (p >> 17) - (smallest >> 17)
    if encode.INTERPRETED:
        return (code & 0x7FF) | (sign & ~0x7FF)
    # The same as one LOP3, where LLVM would mask each of the two.
    return tl.inline_asm_elementwise(
        "{ .reg .b32 other; xor.b32 other, $1, $2; and.b32 other, other, 0x7FF; xor.b32 $0, other, $1; }",
        "=r,r,r", [sign, code], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def eighths(x):
    """x [M, 128] -> its values 8 i, 8 i + 1, ... 8 i + 7, each [M, 16]."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], RUNS, 4, 2)))
    x0, x2 = tl.split(tl.reshape(even, (x.shape[0], RUNS, 2, 2)))
    x1, x3 = tl.split(tl.reshape(odd, (x.shape[0], RUNS, 2, 2)))
    a0, a4 = tl.split(x0)
    a2, a6 = tl.split(x2)
    a1, a5 = tl.split(x1)
    a3, a7 = tl.split(x3)
    return a0, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def pack_kernel(x, words, scales, M, K, stride_m, floor, BLOCK_M: tl.constexpr):
    """x [M, K] -> words [M, 3 K / 8], scales [ceil(K/128), M]."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * encode.TILE + tl.arange(0, encode.TILE)
    mask = (m < M)[:, None] & (k < K)[None, :]
    value = tl.load(x + m.to(tl.int64)[:, None] * stride_m + k[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = encode.power_of_two_above(encode.amax_bits(value, 1), floor, E5M6_MAX_BITS)
    tl.store(scales + tl.program_id(1).to(tl.int64) * M + m, scale, mask=m < M)
    c0, c1, c2, c3, c4, c5, c6, c7 = eighths(codes_of(value, scale[:, None]))
    low = c0 + (c1 << 12) + (c2 << 24)
    middle = (c2 >> 8) + (c3 << 4) + (c4 << 16) + (c5 << 28)
    high = (c5 >> 4) + (c6 << 8) + (c7 << 20)
    four = tl.reshape(tl.join(tl.join(low, high), tl.join(middle, high)), (BLOCK_M, 4 * RUNS))
    i = tl.arange(0, 4 * RUNS)  # neighbours in fours, of unknown alignment: lanes go along a row, a word each
    word, row_words = (tl.program_id(1) * RUNS + i // 4) * 3 + i % 4, K // 8 * 3
    words += tl.program_id(0).to(tl.int64) * BLOCK_M * row_words
    here = words + (tl.arange(0, BLOCK_M)[:, None] * row_words + word[None, :])
    tl.store(here, four, mask=(m < M)[:, None] & ((i % 4 < 3) & (word < row_words))[None, :])


@triton.jit
def value_of(code):
    """Codes, the bits above 12 of any kind -> FP32."""
    return (code << 4).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_runs(words, mask, M: tl.constexpr):
    """The values of runs of M rows, whose first words are given, [M, K] FP32 without scales; zeros beyond the mask.

    Runs have one dim: with rows as another, Triton 3.6 would put lanes along rows.
    """
    low = tl.load(words, mask=mask, other=0)
    middle, high = tl.load(words + 1, mask=mask, other=0), tl.load(words + 2, mask=mask, other=0)
    four04 = tl.join(value_of(low), value_of(middle >> 16))
    four26 = tl.join(value_of(((low >> 24) & 0xFF) | (middle << 8)), value_of(high >> 8))
    four15 = tl.join(value_of(low >> 12), value_of(((middle >> 28) & 0xF) | (high << 4)))
    four37 = tl.join(value_of(middle >> 4), value_of(high >> 20))
    eight = tl.join(tl.join(four04, four26), tl.join(four15, four37))
    return tl.reshape(eight, (M, 8 * words.shape[0] // M))


@triton.jit
def unpack_kernel(
    words, scales, out, M, K, stride_m, scale_stride_m, scale_stride_k, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr
):
    """words [M, 3 K / 8] -> out [M, K]."""
    i = tl.arange(0, BLOCK_M * RUNS)
    row, run = tl.program_id(0) * BLOCK_M + i // RUNS, tl.program_id(1) * RUNS + i % RUNS
    value = load_runs(words + row.to(tl.int64) * stride_m + run * 3, (row < M) & (run < K // 8), BLOCK_M)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    where = scales + m.to(tl.int64) * scale_stride_m + tl.program_id(1).to(tl.int64) * scale_stride_k
    value *= tl.load(where, mask=m < M, other=1.0)[:, None]
    k = tl.program_id(1) * encode.TILE + tl.arange(0, encode.TILE)
    here = out + m.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(here, encode.to_output(value, DTYPE), mask=(m < M)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["scale_stride_k"])
def e5m6_columns_kernel(
    words, scales, columns, columns_scale, M, K, stride_m, scale_stride_m, scale_stride_k, floor,
    BLOCK_K: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """words [M, 3 K / 8] -> FP8 columns [K, M], scales powers of two."""
    block, first = tl.program_id(0), tl.program_id(1) * BLOCK_K
    R: tl.constexpr = BLOCK_K // 8
    i = tl.arange(0, encode.TILE * R)
    m, lane = token_at(i // R, OWN)
    words += block.to(tl.int64) * encode.TILE * stride_m
    value = load_runs(words + (m * stride_m + (first // 8 + i % R) * 3), lane < M - block * encode.TILE, encode.TILE)
    value *= load_factors(scales + scale_at(first, scale_stride_k), block, scale_stride_m, M, OWN)
    cast_columns(value, columns, columns_scale, block, first, M, K, K, floor, True, OWN)


def pack_e5m6(x: Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR) -> E5m6Tensor:
    flat = last_dim_contiguous(x if x.dim() == 2 else x.flatten(0, -2))
    m, k = flat.shape
    num_words = k // E5M6_VALUES * E5M6_WORDS
    words = torch.empty(m, num_words, dtype=torch.int32, device=x.device)
    scale = empty_scales(m, k, x.device)
    if m and k:
        _pack_launch(m, k, flat.stride(0), amax_floor)(flat, words, scale)
    if x.dim() == 2:
        return E5m6Tensor(words, scale)
    lead = x.shape[:-1]
    return E5m6Tensor(words.view(*lead, num_words), scale.reshape(*lead, ceil_div(k, TILE)))


@by_shapes
def _pack_launch(m: int, k: int, stride: int, amax_floor: float) -> Prepared:
    grid = ceil_div(m, BLOCK_M), ceil_div(k, TILE)
    return Prepared(pack_kernel, grid, m, k, stride, amax_floor, BLOCK_M=BLOCK_M, num_warps=NUM_WARPS)


def unpack_e5m6(packed: E5m6Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    out = torch.empty(packed.shape, dtype=dtype, device=packed.device)
    words, scale = packed.data, packed.scale
    if words.dim() > 2:
        words, scale = words.flatten(0, -2), scale.flatten(0, -2)
    if out.numel():
        words = last_dim_contiguous(words)
        launch_on = _unpack_launch(words.shape[0], out.shape[-1], words.stride(0), scale.stride(), dtype)
        launch_on(words, scale, out)
    return out


@by_shapes
def _unpack_launch(m: int, k: int, stride: int, scale_strides: tuple[int, ...], dtype: torch.dtype) -> Prepared:
    return Prepared(
        unpack_kernel, (ceil_div(m, BLOCK_M), ceil_div(k, TILE)), m, k, stride, *scale_strides,
        DTYPE=TL_DTYPE[dtype], BLOCK_M=BLOCK_M, num_warps=NUM_WARPS,
    )  # fmt: skip


def e5m6_to_columns(packed: E5m6Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR) -> Fp8Tensor:
    m, k = packed.shape
    columns = empty_columns(m, k, packed.device)
    words = last_dim_contiguous(packed.data)
    if m and k:
        launch_on = _columns_launch(m, k, words.stride(0), packed.scale.stride(), amax_floor)
        launch_on(words, packed.scale, columns.data, columns.scale)
    return columns


@by_shapes
def _columns_launch(m: int, k: int, stride: int, scale_strides: tuple[int, ...], amax_floor: float) -> Prepared:
    block_k = math.gcd(k, COLUMNS_BLOCK_K)
    own = block_k * TILE // (NUM_WARPS * LANES * E5M6_VALUES)
    return Prepared(
        e5m6_columns_kernel, (ceil_div(m, TILE), ceil_div(k, block_k)), m, k, stride, *scale_strides,
        amax_floor, BLOCK_K=block_k, OWN=own, num_warps=NUM_WARPS,
    )  # fmt: skip
