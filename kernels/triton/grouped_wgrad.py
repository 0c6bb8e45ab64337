"""Grouped FP8 weight gradient in Triton: one launch for all experts, each contracting over its own tokens.

The second axis of the grid is the expert; a program reads where its group starts and ends from the device and loops
over just those tokens. An empty group neither reads nor writes `main_grad`. Groups start on multiples of 128, so no
tile of the contraction is short and no scale covers two experts.
"""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.fp8 import Fp8Tensor, ceil_div
from fp8moe.kernels.triton import encode
from fp8moe.kernels.triton.gemm import choose_tile, descriptor, scaled_product, tile_order


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
    grouped_wgrad_kernel[(ceil_div(n, tile.block_m) * ceil_div(k, tile.block_n), num_groups)](
        descriptor(dy_columns.data, tile.block_m), descriptor(x_columns.data, tile.block_n), main_grad,
        dy_columns.scale, x_columns.scale, group_offsets.contiguous(), n, k,
        *dy_columns.scale.stride(), *x_columns.scale.stride(), *main_grad.stride(),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, GROUP=tile.group,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
