"""From BF16 operands of a weight gradient to a launch of `tokens_kernel`."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from fp8moe.kernels.fp8 import ceil_div
from fp8moe.kernels.gluon.epilogues import ADD, ADD_FETCHED
from fp8moe.kernels.gluon.launch import PIECE_COLUMNS, WAVE_ROWS, Descriptor, has_room, takes_waves
from fp8moe.kernels.gluon.tokens_kernel import BM, LINE, TOKENS, tokens_kernel
from fp8moe.kernels.tiles import Tile
from fp8moe.kernels.triton.launch import Block, launch
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
    epilogue = _epilogue(main_grad, tile)
    form = _form(tile, group_offsets is not None, epilogue)
    num_tiles = num_groups * ceil_div(n, tile.block_m) * ceil_div(k, tile.block_n)
    launch(
        tokens_kernel,
        (min(sms, num_tiles),),
        _operand(dy, form.dy),
        _operand(x, form.x),
        main_grad if epilogue == ADD.value else Descriptor(main_grad, [num_groups * n, k], [k, 1], form.added),
        group_offsets,
        num_groups,
        n,
        k,
        t,
        main_grad.stride(0),
        main_grad.stride(1),
        **form.constants,
    )


def _epilogue(main_grad: Tensor, tile: Tile) -> int:
    """How tiles are added into main_grad [E, N, K]: to what TMA has fetched, or by registers."""
    total = main_grad[0] if len(main_grad) == 1 else main_grad
    return ADD_FETCHED.value if takes_waves(total) and can_fetch_tokens(tile) else ADD.value


def can_fetch_tokens(tile: Tile) -> bool:
    """Whether shared memory has room for the ring of a tile and for what a wave of each consumer is added to."""
    return has_room(tile.stages * (tile.block_m + tile.block_n) * TOKENS.value * BYTES)


@dataclass(frozen=True)
class _Form:
    """What of a launch follows from its tile and epilogue alone: what each descriptor moves, and the constants."""

    dy: Block
    x: Block
    added: Block  # ADD_FETCHED
    constants: dict[str, Any]


@functools.cache
def _form(tile: Tile, grouped: bool, epilogue: int) -> _Form:
    assert tile.block_m == BM.value and not tile.multicast, "tiles of 128 rows, two consumers of 64"
    numbers = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    sums = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    return _Form(
        dy=Block([TOKENS.value, LINE.value], numbers),
        x=Block([TOKENS.value, tile.block_n], numbers),
        added=Block([WAVE_ROWS, PIECE_COLUMNS], sums),
        constants={
            "BN": tile.block_n,
            "STAGES": tile.stages,
            "GROUP": tile.group,
            "GROUPED": grouped,
            "EPILOGUE": epilogue,
            "num_warps": tile.warps,
        },
    )


def _operand(tokens: Tensor, block: Block) -> Descriptor:
    """A descriptor of BF16 `tokens` [T, *]."""
    tokens = aligned(tokens)
    return Descriptor(tokens, list(tokens.shape), list(tokens.stride()), block)
