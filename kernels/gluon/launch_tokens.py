"""From BF16 operands of a weight gradient to a launch of `tokens_kernel`."""

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from fp8moe.kernels.fp8 import ceil_div
from fp8moe.kernels.gluon.epilogues import ADD, ADD_FETCHED
from fp8moe.kernels.gluon.launch import PIECE_COLUMNS, WAVE_ROWS, Descriptor, has_room, takes_waves
from fp8moe.kernels.gluon.tokens_kernel import BM, LINE, TOKENS, tokens_kernel
from fp8moe.kernels.tiles import Tile
from fp8moe.kernels.triton.launch import Block, Described, Prepared, by_shapes, layout_of
from fp8moe.kernels.triton.wgrad import aligned

BYTES = 2  # of a BF16 number


def by_triton(dy: Tensor, x: Tensor, main_grad: Tensor) -> bool:
    """Whether `tokens_kernel` can't: an operand is FP32, or the numbers of a row of main_grad don't lie together."""
    return torch.float32 in (dy.dtype, x.dtype) or main_grad.stride(-1) != 1


def launch_tokens(
    dy: Tensor, x: Tensor, main_grad: Tensor, group_offsets: Tensor | None, *, tile: Tile, sms: int
) -> None:
    """main_grad [E, N, K] += dy [rows of e, N]^T @ x [rows of e, K]; without offsets E is 1; no size may be zero."""
    (t, n), k, num_groups = dy.shape, x.shape[1], main_grad.shape[0]
    dy, x, (expert_stride, stride, _) = aligned(dy), aligned(x), main_grad.stride()
    launch_on = tokens_launch(
        t, n, k, num_groups, dy.stride(0), x.stride(0), expert_stride, stride, group_offsets is not None,
        tokens_epilogue(*layout_of(main_grad), tile), tile, sms,
    )  # fmt: skip
    launch_on(dy, x, main_grad, group_offsets)


@by_shapes
def tokens_launch(
    t: int, n: int, k: int, num_groups: int, stride_dy: int, stride_x: int, expert_stride: int, stride: int,
    grouped: bool, epilogue: int, tile: Tile, sms: int,
) -> Prepared:  # fmt: skip
    assert tile.block_m == BM.value and not tile.multicast, "tiles of 128 rows, two consumers of 64"
    described: tuple[Described, ...] = (
        ([t, n], [stride_dy, 1], _block(TOKENS.value, LINE.value, 16)),
        ([t, k], [stride_x, 1], _block(TOKENS.value, tile.block_n, 16)),
    )
    if epilogue == ADD_FETCHED.value:
        described += (([num_groups * n, k], [k, 1], _block(WAVE_ROWS, PIECE_COLUMNS, 32)),)
    num_tiles = num_groups * ceil_div(n, tile.block_m) * ceil_div(k, tile.block_n)
    return Prepared(
        tokens_kernel, (min(sms, num_tiles),), num_groups, n, k, t, expert_stride, stride, described=described,
        descriptor=Descriptor, BN=tile.block_n, STAGES=tile.stages, GROUP=tile.group, GROUPED=grouped,
        EPILOGUE=epilogue, num_warps=tile.warps,
    )  # fmt: skip


@functools.cache
def _block(rows: int, columns: int, bits: int) -> Block:
    return Block([rows, columns], gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2))


def tokens_epilogue(shape: torch.Size, strides: tuple[int, ...], rest: int, tile: Tile) -> int:
    """How tiles are added into main_grad [E, N, K] of this layout: to what TMA has fetched, or by registers."""
    if len(shape) == 3 and shape[0] == 1:  # there is no next expert
        shape, strides = torch.Size(shape[1:]), strides[1:]
    return ADD_FETCHED.value if takes_waves(shape, strides, rest) and can_fetch_tokens(tile) else ADD.value


def can_fetch_tokens(tile: Tile) -> bool:
    """Whether shared memory has room for the ring of a tile and for what a wave of each consumer is added to."""
    return has_room(tile.stages * (tile.block_m + tile.block_n) * TOKENS.value * BYTES)
