"""Grouped FP8 GEMM in Triton: `gemm`'s inner loop, the expert of each tile of rows found on the device.

The grid covers all rows, whoever they belong to, so the host never waits for group sizes: a program counts the group
ends at or before its first row, which is its expert, empty groups skipped by themselves. Groups start on multiples of
128, so a tile of 128 rows has one expert; tiles past the last group write zeros.

The weight gradient has the expert on the second axis of the grid; a program reads where its group starts and ends and
loops over just those tokens. An empty group neither reads nor writes `main_grad`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.fp8 import Fp8Tensor, ceil_div, next_power_of_2
from fp8moe.kernels.triton import encode
from fp8moe.kernels.triton.gemm import TL_DTYPE, choose_tile, descriptor, scaled_product
from fp8moe.kernels.triton.launch import launch
from fp8moe.kernels.triton.order import tile_order


@triton.jit
def group_of_row(row, group_ends, E, E_PADDED: tl.constexpr):
    """The group that `row` lies in, E past the last one; group_ends: int32 [E], ascending."""
    index = tl.arange(0, E_PADDED)
    ends = tl.load(group_ends + index, mask=index < E, other=2147483647)
    return tl.sum((ends <= row).to(tl.int32), axis=0)


@triton.jit
def grouped_gemm_kernel(
    a, b, out, a_scale, b_scale, group_offsets, R, N, K, E, a_stride_m, a_stride_k,
    b_stride_e, b_stride_n, b_stride_k, stride_m, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, E_PADDED: tl.constexpr,
):  # fmt: skip
    """out [R, N]: a [rows of e, K] @ b [e * N + n, K]^T for each group; b is [E, N, K] seen as [E * N, K]."""
    m_tile, n_tile = tile_order(tl.program_id(0), tl.cdiv(R, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m, n = m_tile * BLOCK_M + tl.arange(0, BLOCK_M), n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mask = m < R
    e = group_of_row(m_tile * BLOCK_M, group_offsets + 1, E, E_PADDED)
    a_scale += m.to(tl.int64) * a_stride_m
    b_scale += e.to(tl.int64) * b_stride_e + n_tile.to(tl.int64) * b_stride_n
    num_k = tl.where(e < E, tl.cdiv(K, encode.TILE), 0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, num_k):
        # A last tile of N reads on into the next expert's rows; those columns are not stored.
        acc = scaled_product(
            acc, a, b, m_tile * BLOCK_M, e * N + n_tile * BLOCK_N, k, a_scale, b_scale,
            a_stride_k, b_stride_k, m_mask, n < N, True,
        )  # fmt: skip
    where = out + m.to(tl.int64)[:, None] * stride_m + n[None, :]
    tl.store(where, encode.to_output(acc, DTYPE), mask=m_mask[:, None] & (n < N)[None, :])


def grouped_gemm(
    a: Fp8Tensor, b: Fp8Tensor, group_offsets: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    (r, k), (num_groups, n, _) = a.shape, b.shape
    out = torch.empty(r, n, dtype=out_dtype, device=a.device)
    if out.numel() == 0 or num_groups == 0 or k == 0:
        return out.zero_()
    tile = choose_tile("grouped_gemm", ceil_div(r, num_groups), n, k, a.device, num_groups)
    launch(
        grouped_gemm_kernel, (ceil_div(r, tile.block_m) * ceil_div(n, tile.block_n),),
        descriptor(a.data, tile.block_m), descriptor(b.data.reshape(-1, k), tile.block_n), out, a.scale, b.scale,
        group_offsets.contiguous(), r, n, k, num_groups, *a.scale.stride(), *b.scale.stride(), out.stride(0),
        DTYPE=TL_DTYPE[out_dtype], BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, GROUP=tile.group,
        E_PADDED=next_power_of_2(num_groups), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


@triton.jit
def grouped_wgrad_kernel(
    dy, x, main_grad, dy_scale, x_scale, group_offsets, N, K, dy_stride_n, dy_stride_t, x_stride_k, x_stride_t,
    stride_e, stride_n, stride_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """main_grad [E, N, K] += dy [N, tokens of e] @ x [K, tokens of e]^T."""
    e = tl.program_id(1)
    first, last = tl.load(group_offsets + e) // encode.TILE, tl.load(group_offsets + e + 1) // encode.TILE
    if first == last:
        return
    n_tile, k_tile = tile_order(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP)
    n, k = n_tile * BLOCK_M + tl.arange(0, BLOCK_M), k_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask, k_mask = n < N, k < K
    dy_scale += n.to(tl.int64) * dy_stride_n
    x_scale += k.to(tl.int64) * x_stride_k
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for t in range(first, last):
        acc = scaled_product(
            acc, dy, x, n_tile * BLOCK_M, k_tile * BLOCK_N, t, dy_scale, x_scale,
            dy_stride_t, x_stride_t, n_mask, k_mask, False,
        )  # fmt: skip
    where = main_grad + e.to(tl.int64) * stride_e
    where += n.to(tl.int64)[:, None] * stride_n + k.to(tl.int64)[None, :] * stride_k
    mask = n_mask[:, None] & k_mask[None, :]
    tl.store(where, acc + tl.load(where, mask=mask, other=0.0), mask=mask)


def grouped_wgrad(dy_columns: Fp8Tensor, x_columns: Fp8Tensor, group_offsets: Tensor, main_grad: Tensor) -> None:
    (n, r), k, num_groups = dy_columns.shape, x_columns.shape[0], main_grad.shape[0]
    if r == 0 or main_grad.numel() == 0:
        return
    tile = choose_tile("grouped_wgrad", n, k, ceil_div(r, num_groups), main_grad.device, num_groups)
    launch(
        grouped_wgrad_kernel, (ceil_div(n, tile.block_m) * ceil_div(k, tile.block_n), num_groups),
        descriptor(dy_columns.data, tile.block_m), descriptor(x_columns.data, tile.block_n), main_grad,
        dy_columns.scale, x_columns.scale, group_offsets.contiguous(), n, k,
        *dy_columns.scale.stride(), *x_columns.scale.stride(), *main_grad.stride(),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, GROUP=tile.group,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
