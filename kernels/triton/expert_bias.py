"""Biases of experts in Triton: one launch an op, the group of a row found on the device.

Adding and the routing weights' gradient go by rows, whose groups start anywhere. A bias's gradient is summed by one
program for a group and a few columns, over the group's rows in their order: no atomics, no partial sums in memory, and
an empty group's program ends at once.
"""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.fp8 import TILE, Fp8Tensor, Rows, ceil_div
from fp8moe.kernels.triton import encode
from fp8moe.kernels.triton.gemm import TL_DTYPE
from fp8moe.kernels.triton.groups import group_width, groups_of
from fp8moe.kernels.triton.launch import launch
from fp8moe.kernels.triton.quantize import last_dim_contiguous

NUM_WARPS = 4
BLOCK_M = 16  # rows, and columns of a tile of them
BLOCK_N = TILE  # one scale a row of FP8
SUM_COLUMNS = 64  # of a program that sums rows
SUM_ROWS = 32  # at a time
FP8_COLUMNS = 16  # of one that sums FP8 columns, 128 tokens at a time


@triton.jit
def bias_of(bias, offsets, m, n, N, E: tl.constexpr, WIDTH: tl.constexpr):
    """The bias [E, N] of rows m at columns n, FP32; zeros past the last group."""
    group = groups_of(offsets, m, E, WIDTH)
    where = bias + group.to(tl.int64)[:, None] * N + n[None, :]
    return tl.load(where, mask=(group < E)[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["R"])
def bias_add_kernel(
    y, bias, offsets, weights, R, N, DTYPE: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y [R, N] += weights [R] x bias [E, N] of the row's group."""
    num_n = tl.cdiv(N, BLOCK_N)
    m = tl.program_id(0) // num_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    added = bias_of(bias, offsets, m, n, N, E, WIDTH)
    if weights is not None:
        added *= tl.load(weights + m, mask=m < R, other=0.0)[:, None]
    mask = (m < R)[:, None] & (n < N)[None, :]
    where = y + m.to(tl.int64)[:, None] * N + n[None, :]
    value = tl.load(where, mask=mask, other=0.0).to(tl.float32) + added
    tl.store(where, encode.to_output(value, DTYPE), mask=mask)


@triton.jit(do_not_specialize=["R", "scale_stride_n"])
def bias_dgrad_kernel(
    dy, scales, bias, offsets, d_weights, R, N, stride_m, scale_stride_m, scale_stride_n, E: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """d_weights [R] += the sum over N of dy [R, N] x bias; with `scales` dy is FP8 rows, and BLOCK_N a tile."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    far = m.to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(0, tl.cdiv(N, BLOCK_N)):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (m < R)[:, None] & (n < N)[None, :]
        value = tl.load(dy + far[:, None] * stride_m + n[None, :], mask=mask, other=0.0).to(tl.float32)
        if scales is not None:
            where = scales + far * scale_stride_m + tl.cast(tile, tl.int64) * scale_stride_n
            value *= tl.load(where, mask=m < R, other=0.0)[:, None]
        total += value * bias_of(bias, offsets, m, n, N, E, WIDTH)
    before = tl.load(d_weights + m, mask=m < R, other=0.0)
    tl.store(d_weights + m, before + tl.sum(total, axis=1), mask=m < R)


@triton.jit
def bias_rows_kernel(dy, weights, offsets, main_grad, N, stride_m, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """main_grad [E, N] += dy [rows of e, N] x weights, summed."""
    num_n = tl.cdiv(N, BLOCK_N)
    e = tl.program_id(0) // num_n
    n = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    start, end = tl.load(offsets + e), tl.load(offsets + e + 1)
    if start < end:
        total = tl.zeros((ROWS, BLOCK_N), tl.float32)
        for first in range(start, end, ROWS):
            m = first + tl.arange(0, ROWS)
            where = dy + m.to(tl.int64)[:, None] * stride_m + n[None, :]
            value = tl.load(where, mask=(m < end)[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
            if weights is not None:
                value *= tl.load(weights + m, mask=m < end, other=0.0)[:, None]
            total += value
        into = main_grad + e.to(tl.int64) * N + n
        tl.store(into, tl.load(into, mask=n < N, other=0.0) + tl.sum(total, axis=0), mask=n < N)


@triton.jit(do_not_specialize=["scale_stride_m"])
def bias_columns_kernel(
    codes, scales, weights, offsets, main_grad, N, stride_n, stride_m, scale_stride_n, scale_stride_m,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same of FP8 columns [N, R], a tile of 128 tokens at a time: groups are whole tiles."""
    num_n = tl.cdiv(N, BLOCK_N)
    e = tl.program_id(0) // num_n
    n = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    start, end = tl.load(offsets + e) // encode.TILE, tl.load(offsets + e + 1) // encode.TILE
    if start < end:
        total = tl.zeros((BLOCK_N, encode.TILE), tl.float32)
        far = n.to(tl.int64)
        for tile in range(start, end):
            m = tl.cast(tile, tl.int64) * encode.TILE + tl.arange(0, encode.TILE)
            where = codes + far[:, None] * stride_n + m[None, :] * stride_m
            value = tl.load(where, mask=(n < N)[:, None], other=0.0).to(tl.float32)
            scale = scales + far * scale_stride_n + tl.cast(tile, tl.int64) * scale_stride_m
            value *= tl.load(scale, mask=n < N, other=0.0)[:, None]
            if weights is not None:
                value *= tl.load(weights + m)[None, :]
            total += value
        into = main_grad + e.to(tl.int64) * N + n
        tl.store(into, tl.load(into, mask=n < N, other=0.0) + tl.sum(total, axis=1), mask=n < N)


def add_expert_bias(y: Tensor, bias: Tensor, group_offsets: Tensor, weights: Tensor | None = None) -> None:
    r, n = y.shape
    if y.numel() and len(bias):
        launch(
            bias_add_kernel, (ceil_div(r, BLOCK_M) * ceil_div(n, BLOCK_N),),
            y, bias.contiguous(), group_offsets.contiguous(), _contiguous(weights), r, n, DTYPE=TL_DTYPE[y.dtype],
            E=len(bias), WIDTH=group_width(len(bias)), BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=NUM_WARPS,
        )  # fmt: skip


def expert_bias_dgrad(dy: Rows, bias: Tensor, group_offsets: Tensor, d_weights: Tensor) -> None:
    data, scale = (dy.data, dy.scale) if isinstance(dy, Fp8Tensor) else (dy, None)
    data = last_dim_contiguous(data)
    r, n = data.shape
    if data.numel() and len(bias):
        launch(
            bias_dgrad_kernel, (ceil_div(r, BLOCK_M),),
            data, scale, bias.contiguous(), group_offsets.contiguous(), d_weights, r, n,
            data.stride(0), *((0, 0) if scale is None else scale.stride()), E=len(bias), WIDTH=group_width(len(bias)),
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=NUM_WARPS,
        )  # fmt: skip


def expert_bias_wgrad(dy: Rows, group_offsets: Tensor, main_grad: Tensor, weights: Tensor | None = None) -> None:
    e, n = main_grad.shape
    if main_grad.numel() == 0 or 0 in dy.shape:
        return
    given = _contiguous(weights), group_offsets.contiguous(), main_grad, n
    if isinstance(dy, Fp8Tensor):
        launch(
            bias_columns_kernel, (e * ceil_div(n, FP8_COLUMNS),),
            dy.data, dy.scale, *given, *dy.data.stride(), *dy.scale.stride(),
            BLOCK_N=FP8_COLUMNS, num_warps=NUM_WARPS,
        )  # fmt: skip
        return
    rows = last_dim_contiguous(dy)
    launch(
        bias_rows_kernel, (e * ceil_div(n, SUM_COLUMNS),),
        rows, *given, rows.stride(0), ROWS=SUM_ROWS, BLOCK_N=SUM_COLUMNS, num_warps=NUM_WARPS,
    )  # fmt: skip


def _contiguous(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.contiguous()
