"""Messages between ranks in Triton: rows are packed into bytes, and unpacked, in one launch each.

The first programs move bodies as `permute` moves rows, words of integers in accesses of up to 16 bytes; the programs
behind them move the rest of a row, TAIL_ROWS rows each: weights, ids, the sender, exponents of scales. A kernel that
moves both was refused: most of its lanes would wait for the few bytes of the rest. Numbers that differ from rank to
rank are not specialised.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.device_layout import empty_rows
from fp8moe.kernels.fp8 import Fp8Tensor, Rows, ceil_div, next_power_of_2
from fp8moe.kernels.message_layout import MANTISSA_BITS, MessageLayout
from fp8moe.kernels.row_map import RowMap
from fp8moe.kernels.triton.launch import Prepared, by_shapes
from fp8moe.kernels.triton.permute import NUM_WARPS, WORDS, copy_block, plan_groups, vector_bytes
from fp8moe.kernels.triton.plan import peers_kernel
from fp8moe.kernels.triton.quantize import last_dim_contiguous

TAIL_ROWS = 32
PEER_PAIRS = 2048  # pairs of a row's ids that a program compares
_SHIFT = tl.constexpr(MANTISSA_BITS)


@triton.jit
def move_bodies(
    x, sources, out, R, width, stride, out_stride, block,
    UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """out [R, width] = x [N, width] at sources, zeros where those are negative; width and strides in UNIT words."""
    num_w = tl.cdiv(width * UNIT, BLOCK_W)
    r = block // num_w * BLOCK_R + tl.arange(0, BLOCK_R)
    w = block % num_w * BLOCK_W + tl.arange(0, BLOCK_W)
    n = tl.load(sources + r, mask=r < R, other=-1)
    inside = (w < width * UNIT)[None, :]
    words = tl.load(x + n[:, None] * (stride * UNIT) + w[None, :], mask=(n >= 0)[:, None] & inside, other=0)
    where = out + r.to(tl.int64)[:, None] * (out_stride * UNIT) + w[None, :]
    tl.store(where, words, mask=(r < R)[:, None] & inside)


@triton.jit(do_not_specialize=["sender"])
def pack_message_kernel(
    x, sources, out, scales, ids, weights, out_int16, out_fp32, out_bytes, S, width, stride, out_stride,
    scale_stride_n, scale_stride_t, num_tiles, ids_stride_n, ids_stride_k, weights_stride_n, weights_stride_k, sender,
    body_programs, FP8: tl.constexpr, TOPK: tl.constexpr, BODY: tl.constexpr, WEIGHTS: tl.constexpr, IDS: tl.constexpr,
    SENDER: tl.constexpr, EXPONENTS: tl.constexpr, ROW: tl.constexpr, UNIT: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, TAIL_ROWS: tl.constexpr,
):  # fmt: skip
    """out [S, ROW bytes] of x [N, width] at sources; `out_*` is the same memory, offsets of parts are in bytes."""
    block = tl.program_id(0)
    if block < body_programs:
        move_bodies(x, sources, out, S, width, stride, out_stride, block, UNIT, BLOCK_R, BLOCK_W)
    else:
        r = (block - body_programs) * TAIL_ROWS + tl.arange(0, TAIL_ROWS)
        n = tl.load(sources + r, mask=r < S, other=-1)
        here, row = n >= 0, r.to(tl.int64)[:, None] * ROW
        if TOPK > 0:
            k = tl.arange(0, BLOCK_K)[None, :]
            known, mask = here[:, None] & (k < TOPK), (r < S)[:, None] & (k < TOPK)
            weight = tl.load(weights + n[:, None] * weights_stride_n + k * weights_stride_k, mask=known, other=0.0)
            tl.store(out_fp32 + (row + WEIGHTS) // 4 + k, weight, mask=mask)
            id_ = tl.load(ids + n[:, None] * ids_stride_n + k * ids_stride_k, mask=known, other=-1)
            tl.store(out_int16 + (row + IDS) // 2 + k, (~id_).to(tl.int16), mask=mask)
            start = tl.where(here[:, None], ~sender, 0).to(tl.int16)
            tl.store(out_int16 + (row + SENDER) // 2, start, mask=(r < S)[:, None])
            gap = tl.arange(0, 4)[None, :]
            zero = tl.zeros((TAIL_ROWS, 4), tl.uint8)
            tl.store(out_bytes + row + BODY + gap, zero, mask=(r < S)[:, None] & (gap < WEIGHTS - BODY))
        t = tl.arange(0, BLOCK_T)[None, :]
        exponent = tl.zeros((TAIL_ROWS, BLOCK_T), tl.int32)
        if FP8:
            where = scales + n[:, None] * scale_stride_n + t.to(tl.int64) * scale_stride_t
            scale = tl.load(where, mask=here[:, None] & (t < num_tiles), other=0.0)
            exponent = tl.where(scale == scale, (scale.to(tl.int32, bitcast=True) >> _SHIFT) & 255, 0)
        # Behind the exponents the row is zero up to its end.
        tl.store(out_bytes + row + EXPONENTS + t, exponent.to(tl.uint8), mask=(r < S)[:, None] & (t < ROW - EXPONENTS))


@triton.jit
def unpack_message_kernel(
    x, sources, out, slots, message_fp32, message_bytes, scales, weights, R, width, stride, out_stride, num_tiles,
    body_programs, FP8: tl.constexpr, TOPK: tl.constexpr, WEIGHTS: tl.constexpr, EXPONENTS: tl.constexpr,
    ROW: tl.constexpr, UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_T: tl.constexpr,
    TAIL_ROWS: tl.constexpr,
):  # fmt: skip
    """out [R, width], scales [num_tiles, R], weights [R] of a message [N, ROW bytes] at sources; x is its words."""
    block = tl.program_id(0)
    if block < body_programs:
        move_bodies(x, sources, out, R, width, stride, out_stride, block, UNIT, BLOCK_R, BLOCK_W)
    else:
        r = (block - body_programs) * TAIL_ROWS + tl.arange(0, TAIL_ROWS)
        n = tl.load(sources + r, mask=r < R, other=-1)
        if TOPK > 0:
            slot = tl.load(slots + r, mask=r < R, other=0)
            weight = tl.load(message_fp32 + (n * ROW + WEIGHTS) // 4 + slot - n * TOPK, mask=n >= 0, other=0.0)
            tl.store(weights + r, weight, mask=r < R)
        if FP8:
            t = tl.arange(0, BLOCK_T)[:, None]
            known = (n >= 0)[None, :] & (t < num_tiles)
            exponent = tl.load(message_bytes + n[None, :] * ROW + EXPONENTS + t, mask=known, other=127).to(tl.int32)
            scale = (exponent << _SHIFT).to(tl.float32, bitcast=True)
            scale = tl.where(exponent == 0, float("nan"), scale)
            tl.store(scales + t.to(tl.int64) * R + r[None, :], scale, mask=(r < R)[None, :] & (t < num_tiles))


def plan_message(
    topk_ids: Tensor, num_peers: int, experts_per_peer: int, *, room: int, first: int = 0, fixed: bool = False
) -> RowMap:
    n, topk = topk_ids.shape
    width = min(topk, num_peers)
    peers = torch.empty(n, width, dtype=torch.int64, device=topk_ids.device)
    if peers.numel():
        launch_on = _peers_launch(
            n, topk, topk_ids.stride(), first, experts_per_peer, num_peers, width, topk_ids.dtype is torch.int16
        )
        launch_on(topk_ids, peers)
    return plan_groups(peers, num_peers, room // num_peers if fixed else 1, room=room, fixed=fixed)


@by_shapes
def _peers_launch(
    n: int, topk: int, strides: tuple[int, ...], first: int, experts_per_peer: int, num_peers: int, width: int,
    inverted: bool,
) -> Prepared:  # fmt: skip
    block_k = next_power_of_2(topk)
    block_n = max(1, PEER_PAIRS // block_k**2)
    return Prepared(
        peers_kernel, (ceil_div(n, block_n),), n, topk, *strides, first, experts_per_peer, num_peers, width,
        INVERTED=inverted, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=NUM_WARPS,
    )  # fmt: skip


def pack_message(
    rows: Rows, row_map: RowMap, topk_ids: Tensor | None = None, weights: Tensor | None = None, *, sender: int = 0
) -> Tensor:
    layout = MessageLayout.of(rows, 0 if topk_ids is None else topk_ids.shape[1])
    data = last_dim_contiguous(rows.data if isinstance(rows, Fp8Tensor) else rows)
    scale = rows.scale if isinstance(rows, Fp8Tensor) else None
    s = row_map.source_R.shape[0]
    message = torch.empty(s, layout.row_bytes, dtype=torch.uint8, device=data.device)
    if message.numel():
        vector = vector_bytes(data)
        strides = tuple((0, 0) if one is None else one.stride() for one in (scale, topk_ids, weights))
        launch_on = _pack_launch(s, layout, vector, data.stride(0), strides, sender)
        word = WORDS[min(vector, 4)]
        launch_on(
            data.view(word), row_map.source_R, message.view(word), scale, topk_ids, weights, message.view(torch.int16),
            message.view(torch.float32), message,
        )  # fmt: skip
    return message


@by_shapes
def _pack_launch(
    s: int, layout: MessageLayout, vector: int, stride: int, strides: tuple[tuple[int, ...], ...], sender: int
) -> Prepared:
    """strides: of scales, ids and weights."""
    sizes, programs, blocks = _bodies(s, layout.body, vector, stride * layout.dtype.itemsize, layout.row_bytes)
    scale_strides, ids_strides, weights_strides = strides
    tail = layout.row_bytes > layout.body
    return Prepared(
        pack_message_kernel, (programs + (ceil_div(s, TAIL_ROWS) if tail else 0),), s, *sizes, *scale_strides,
        layout.num_tiles, *ids_strides, *weights_strides, sender, programs, FP8=layout.fp8, TOPK=layout.topk,
        BODY=layout.body, WEIGHTS=layout.weights, IDS=layout.ids, SENDER=layout.sender, EXPONENTS=layout.exponents,
        ROW=layout.row_bytes, **blocks, BLOCK_K=next_power_of_2(max(layout.topk, 1)),
        BLOCK_T=next_power_of_2(max(layout.row_bytes - layout.exponents, 1)), TAIL_ROWS=TAIL_ROWS, num_warps=NUM_WARPS,
    )  # fmt: skip


def unpack_message(message: Tensor, row_map: RowMap, layout: MessageLayout) -> tuple[Rows, Tensor | None]:
    width, topk = layout.width, layout.topk
    r, device = row_map.source_R.shape[0], message.device
    rows: Rows = empty_rows(r, width, device) if layout.fp8 else message.new_empty(r, width, dtype=layout.dtype)
    weights = torch.empty(r, dtype=torch.float32, device=device) if topk else None
    if r and width:
        message = message.contiguous()
        data, scale = (rows.data, rows.scale) if isinstance(rows, Fp8Tensor) else (rows, None)
        vector = vector_bytes(data)
        word = WORDS[min(vector, 4)]
        _unpack_launch(r, layout, vector)(
            message.view(word), row_map.source_R, data.view(word), row_map.slot_R, message.view(torch.float32), message,
            scale, weights,
        )  # fmt: skip
    return rows, weights


@by_shapes
def _unpack_launch(r: int, layout: MessageLayout, vector: int) -> Prepared:
    sizes, programs, blocks = _bodies(r, layout.body, vector, layout.row_bytes, layout.body)
    tail = layout.fp8 or layout.topk
    return Prepared(
        unpack_message_kernel, (programs + (ceil_div(r, TAIL_ROWS) if tail else 0),), r, *sizes, layout.num_tiles,
        programs, FP8=layout.fp8, TOPK=layout.topk, WEIGHTS=layout.weights, EXPONENTS=layout.exponents,
        ROW=layout.row_bytes, **blocks, BLOCK_T=next_power_of_2(max(layout.num_tiles, 1)), TAIL_ROWS=TAIL_ROWS,
        num_warps=NUM_WARPS,
    )  # fmt: skip


def _bodies(
    rows: int, body: int, vector: int, stride: int, out_stride: int
) -> tuple[tuple[int, int, int], int, dict[str, Any]]:
    """Of `rows` bodies of `body` bytes, moved by accesses of `vector` between rows at these strides, in bytes: width
    and strides in accesses, programs, and the constants of `move_bodies`."""
    word = min(vector, 4)
    block_r, block_w = copy_block(body // word, word)
    programs = ceil_div(rows, block_r) * ceil_div(body // word, block_w)
    constants = {"UNIT": vector // word, "BLOCK_R": block_r, "BLOCK_W": block_w}
    return (body // vector, stride // vector, out_stride // vector), programs, constants
