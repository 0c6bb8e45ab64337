"""The unquantized weight gradient in Triton, added into FP32: of all tokens, or of each group of them.

BF16 operands come through tensor descriptors, straight from shared memory into the tensor core, which reads them
transposed. Pointer loads were refused: their cp.async lacks a fence before WGMMA under Triton 3.6, and addresses and
masks of a tile take registers. A descriptor knows the end of the tensor, not of a group: the tokens behind the last
whole step of a group go through registers, where the next group's rows are masked out of both operands, for 0 x NaN is
NaN.

A tile of 1,024 tokens is about as long on the tensor cores as its sums are in HBM, and every SM would be at the one or
at the other at the same time. So a program asks for its tile of `main_grad` before it multiplies: the sums come into L2
meanwhile. They are added and stored half a tile at a time, for the registers.

FP32 operands have no tensor core: plain products, of 64x64 tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.fp8 import ceil_div
from fp8moe.kernels.tiles import Tile
from fp8moe.kernels.triton import encode
from fp8moe.kernels.triton.launch import Descriptor, block_of, launch, layout_of
from fp8moe.kernels.triton.order import tile_order

TOKENS = 64  # of a step: 128 bytes of BF16, one swizzled line where the tensor core reads it transposed
LINE = tl.constexpr(32)  # FP32 numbers of a line of L2
# FP32 products have no tensor core: 128x128 of them spill registers, and the router is too small to need larger tiles.
EXACT = Tile(64, 64, 2, 8, 8)
EXACT_TOKENS = 32


@triton.jit
def tokens_of(e, group_offsets, T, GROUPED: tl.constexpr):
    """(first, behind the last) token of group e; all T where there are no groups."""
    if GROUPED:
        return tl.load(group_offsets + e), tl.load(group_offsets + e + 1)
    return 0, T


@triton.jit
def add_tile(sums, first_n, first_k, N, K, stride_n, stride_k, product):
    """sums[first_n.., first_k..] += product, where that lies in [N, K]."""
    n, k = first_n + tl.arange(0, product.shape[0]), first_k + tl.arange(0, product.shape[1])
    where = sums + n.to(tl.int64)[:, None] * stride_n + k.to(tl.int64)[None, :] * stride_k
    mask = (n < N)[:, None] & (k < K)[None, :]
    tl.store(where, product + tl.load(where, mask=mask, other=0.0), mask=mask)


@triton.jit
def ask_for_tile(sums, first_n, first_k, N, K, stride_n, stride_k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Start bringing a tile of sums into L2, a line by each thread."""
    if not encode.INTERPRETED:
        n = tl.minimum(first_n + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
        k = tl.minimum(first_k + tl.arange(0, BLOCK_K // LINE) * LINE, K - 1).to(tl.int64)
        lines = (sums + n[:, None] * stride_n + k[None, :] * stride_k).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit(do_not_specialize=["T"])
def wgrad_kernel(
    dy, x, main_grad, group_offsets, T, N, K, stride_e, stride_n, stride_k, GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """main_grad [E, N, K] += dy [tokens of e, N]^T @ x [tokens of e, K], BF16 through descriptors."""
    e = tl.program_id(1)
    first, last = tokens_of(e, group_offsets, T, GROUPED)
    if first == last:
        return
    n_tile, k_tile = tile_order(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP)
    n, k = n_tile * BLOCK_M, k_tile * BLOCK_N
    sums = main_grad + e.to(tl.int64) * stride_e
    ask_for_tile(sums, n, k, N, K, stride_n, stride_k, BLOCK_M, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    whole = (last - first) // BLOCK_T
    for step in range(0, whole):
        left, right = dy.load([first + step * BLOCK_T, n]), x.load([first + step * BLOCK_T, k])
        if encode.INTERPRETED:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(tl.trans(left), right, acc)
    t = first + whole * BLOCK_T
    if t < last:
        mask = (t + tl.arange(0, BLOCK_T) < last)[:, None]
        left, right = dy.load([t, n]), x.load([t, k])
        if encode.INTERPRETED:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(tl.trans(tl.where(mask, left, 0.0)), tl.where(mask, right, 0.0), acc)
    one, other = tl.split(acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))
    add_tile(sums, n, k, N, K, stride_n, stride_k, one)
    add_tile(sums, n, k + BLOCK_N // 2, N, K, stride_n, stride_k, other)


@triton.jit(do_not_specialize=["T"])
def exact_wgrad_kernel(
    dy, x, main_grad, group_offsets, T, N, K, dy_stride_t, dy_stride_n, x_stride_t, x_stride_k,
    stride_e, stride_n, stride_k,
    GROUPED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The same where an operand is FP32: products are FP32, operands lie anyhow."""
    e = tl.program_id(1)
    first, last = tokens_of(e, group_offsets, T, GROUPED)
    if first == last:
        return
    n_tile, k_tile = tile_order(tl.program_id(0), tl.cdiv(N, BLOCK), tl.cdiv(K, BLOCK), GROUP)
    n, k = n_tile * BLOCK + tl.arange(0, BLOCK), k_tile * BLOCK + tl.arange(0, BLOCK)
    n_mask, k_mask = (n < N)[None, :], (k < K)[None, :]
    dy += n.to(tl.int64)[None, :] * dy_stride_n
    x += k.to(tl.int64)[None, :] * x_stride_k
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(0, tl.cdiv(last - first, BLOCK_T)):
        t = first + step * BLOCK_T + tl.arange(0, BLOCK_T)
        t_mask, t_far = (t < last)[:, None], t.to(tl.int64)[:, None]
        left = tl.load(dy + t_far * dy_stride_t, mask=t_mask & n_mask, other=0.0).to(tl.float32)
        right = tl.load(x + t_far * x_stride_t, mask=t_mask & k_mask, other=0.0).to(tl.float32)
        acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")
    sums = main_grad + e.to(tl.int64) * stride_e
    add_tile(sums, n_tile * BLOCK, k_tile * BLOCK, N, K, stride_n, stride_k, acc)


def launch_wgrad(dy: Tensor, x: Tensor, main_grad: Tensor, group_offsets: Tensor | None, tile: Tile) -> None:
    """main_grad [E, N, K] += dy^T @ x of each group; without offsets E is 1 and the group is all tokens."""
    (t, n), k, num_groups, grouped = dy.shape, x.shape[1], main_grad.shape[0], group_offsets is not None
    if t == 0 or main_grad.numel() == 0:
        return
    if torch.float32 in (dy.dtype, x.dtype):
        launch(
            exact_wgrad_kernel, (ceil_div(n, EXACT.block_m) * ceil_div(k, EXACT.block_n), num_groups),
            dy, x, main_grad, group_offsets, t, n, k, *dy.stride(), *x.stride(), *main_grad.stride(),
            GROUPED=grouped, BLOCK=EXACT.block_m, BLOCK_T=EXACT_TOKENS, GROUP=EXACT.group,
            num_warps=EXACT.warps, num_stages=EXACT.stages,
        )  # fmt: skip
        return
    launch(
        wgrad_kernel, (ceil_div(n, tile.block_m) * ceil_div(k, tile.block_n), num_groups),
        _descriptor(dy, tile.block_m), _descriptor(x, tile.block_n), main_grad, group_offsets, t, n, k,
        *main_grad.stride(), GROUPED=grouped, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_T=TOKENS,
        GROUP=tile.group, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _descriptor(tokens: Tensor, columns: int) -> Descriptor:
    """A descriptor of [TOKENS, columns] tiles of BF16 `tokens` [T, *]."""
    tokens = aligned(tokens)
    return Descriptor(tokens, list(tokens.shape), list(tokens.stride()), block_of(TOKENS, columns))


def aligned(matrix: Tensor) -> Tensor:
    """`matrix` as TMA reads it, numbers of a row side by side and rows on 16 bytes: a copy where it lies otherwise."""
    size = matrix.element_size()
    if lies_aligned(*layout_of(matrix), size):
        return matrix
    step = 16 // size
    columns = matrix.shape[-1]
    return matrix.new_empty(*matrix.shape[:-1], ceil_div(columns, step) * step)[..., :columns].copy_(matrix)


def lies_aligned(shape: torch.Size, strides: tuple[int, ...], rest: int, size: int) -> bool:
    """Whether TMA may read numbers of `size` bytes that lie so."""
    return strides[-1] == 1 and strides[-2] * size % 16 == 0 and strides[-2] >= shape[-1] and rest == 0
