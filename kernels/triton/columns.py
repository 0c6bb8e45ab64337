"""FP8 columns of a block of 128 tokens: loads and casts for which a lane holds runs of tokens.

A tile of columns [128, BLOCK_K] is read along k, where memory is contiguous, and written along tokens. A lane loads 4
columns at a time, and so holds 8 or 16 tokens of them: an amax along tokens is left to few lanes, a scale is divided
once for as many values, and codes turn by whole words of shared memory. Triton gives a lane as much as it knows to be
aligned, so strides are passed in units of 4, and no more is known of them. Tokens are dealt to the tile in the order
that makes a lane's tokens neighbours. Requantizing so takes 10 instructions a value (Triton 3.8, sm_90a); with 16
columns a lane, as the widest loads have it, 27, most of them divisions and bytes of shared memory.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.fp8 import TILE
from fp8moe.kernels.triton import encode

QUARTER = 4
VECTOR = tl.constexpr(QUARTER)  # columns a lane loads at once
LANES = 32


def column_block(k: int, widest: int, num_warps: int) -> tuple[int, int]:
    """Columns of a program, none across two scale tiles of k columns side by side, and tokens that a lane holds."""
    block_k = math.gcd(k, widest)
    return block_k, block_k * TILE // (num_warps * LANES * VECTOR.value)


def quarter_stride(x: Tensor) -> tuple[Tensor, int]:
    """x [M, K] itself, or a copy where its last dim is not contiguous or its rows are no multiple of 4 apart."""
    stride, within = x.stride()
    if within != 1 or stride % QUARTER:
        x = x.contiguous()
        stride, _ = x.stride()
    return x, stride // QUARTER


@triton.jit
def token_at(i, OWN: tl.constexpr):
    """The token of a block of 128 at each place of a tile, so that a lane has OWN neighbours, and its lane's first."""
    first = i % (encode.TILE // OWN) * OWN
    return first + i // (encode.TILE // OWN), first


@triton.jit
def tokens_of(OWN: tl.constexpr):
    """All of them, in the tile's order."""
    return token_at(tl.arange(0, encode.TILE), OWN)


@triton.jit
def scale_at(k, scale_stride_k):
    """Where the scales of column k lie."""
    return (k // encode.TILE).to(tl.int64) * scale_stride_k


@triton.jit
def cast_columns(x, codes, scales, block, first, M, K, end, floor, POWER_OF_TWO: tl.constexpr, OWN: tl.constexpr):
    """x [128, BLOCK_K] FP32 at the tokens of a block, columns from `first` to `end` -> codes [K, M], scales."""
    BLOCK_K: tl.constexpr = x.shape[1]
    scale = encode.e4m3_scale_of(encode.amax_bits(x, 0), floor, POWER_OF_TWO)
    scaled = x * encode.inverse_of_scale(scale, POWER_OF_TWO)[None, :]
    scaled = tl.permute(tl.reshape(scaled, (OWN, encode.TILE // OWN, BLOCK_K)), (2, 1, 0))
    code = encode.to_e4m3_words(tl.reshape(scaled, (BLOCK_K, encode.TILE)))
    m, k = block * encode.TILE + tl.arange(0, encode.TILE), first + tl.arange(0, BLOCK_K)
    tl.store(codes + k.to(tl.int64)[:, None] * M + m[None, :], code, mask=(k < end)[:, None] & (m < M)[None, :])
    tl.store(scales + block.to(tl.int64) * K + k, scale, mask=k < end)


@triton.jit
def load_tokens(x, block, k, quarter_stride, M, end, OWN: tl.constexpr):
    """x [M, ...] of stride 4 x quarter_stride at the tokens of a block, columns k, as FP32; zeros outside.

    M is a multiple of 16, so that a lane's tokens are all inside or all outside.
    """
    m, lane = tokens_of(OWN)
    stride = quarter_stride * VECTOR
    x += block.to(tl.int64) * encode.TILE * stride
    mask = (lane < M - block * encode.TILE)[:, None] & (k < end)[None, :]
    return tl.load(x + (m[:, None] * stride + k[None, :]), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_factors(factors, block, stride_m, M, OWN: tl.constexpr):
    """One number for each token of a block, [128, 1]; zero beyond M."""
    m, lane = tokens_of(OWN)
    mask = lane < M - block * encode.TILE
    return tl.load(factors + block.to(tl.int64) * encode.TILE * stride_m + m * stride_m, mask=mask, other=0.0)[:, None]
