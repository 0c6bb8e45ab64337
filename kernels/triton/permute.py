"""Permute and unpermute in Triton: bytes are moved, scales beside them; sums have a fixed order.

`permute` moves rows as integers, so that one kernel serves every dtype and an FP8 code never passes through arithmetic;
where rows begin and end on 16 bytes, as all FP8 rows do, each access is of 16. The scales of FP8 rows move in the same
launch and come to lie M-major, as a grouped GEMM loads them, however they lay before. Padding rows are written there
too: no pass over the memory beforehand.

`unpermute` and `permute_quantize` go from the other side: for each row of x, where its copies are, which the plan
writes beside the map. `unpermute` reads a row's copies in slot order and rounds once, without atomics.
`permute_quantize` reads and casts a row once and writes it to each of its places: gathering instead would read and cast
it again for every expert.

Block sizes are pure functions of the width of a row: what a program holds is the same for all, enough loads in flight
to keep HBM busy (16 KiB of codes, or 1024 sums).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.device_layout import empty_rows
from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR, SIZE_MULTIPLE, TILE, Fp8Tensor, Rows, ceil_div, next_power_of_2
from fp8moe.kernels.row_map import RowMap
from fp8moe.kernels.triton import encode
from fp8moe.kernels.triton.gemm import TL_DTYPE
from fp8moe.kernels.triton.launch import Prepared, by_shapes
from fp8moe.kernels.triton.plan import count_kernel, place_kernel, scan_kernel
from fp8moe.kernels.triton.quantize import last_dim_contiguous

NUM_WARPS = 4
VECTOR = 16  # bytes of the widest access
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
COPIED_WORDS = 4096  # a program of copy_kernel moves
COPIED_BYTES = 1024  # of one row, at most
SUMMED_VALUES = 1024  # a program of sum_kernel sums
CAST_ROWS = 32
# A block of copies is compared with itself: 128 of them take every register a thread has.
PLAN_COPIES, PLAN_EXPERTS, PLAN_BLOCKS = 64, 64, 1024


def copy_block(width: int, word: int) -> tuple[int, int]:
    """Rows and words of a program that copies rows of `width` words of `word` bytes; at least one tile of codes."""
    words = min(max(next_power_of_2(width), TILE // word), COPIED_BYTES // word)
    return COPIED_WORDS // words, words


def sum_block(width: int) -> tuple[int, int]:
    """Rows and values of a program that sums rows of `width` values."""
    values = min(max(next_power_of_2(width), SIZE_MULTIPLE), SUMMED_VALUES)
    return SUMMED_VALUES // values, values


@triton.jit
def copy_kernel(
    x, scales, sources, out, out_scales, R, width, stride, scale_stride_n, scale_stride_t, num_tiles,
    FP8: tl.constexpr, UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """out [R, width] = x [N, width] at sources, zeros where those are negative; width and stride in UNIT words.

    FP8: scales [N, num_tiles] likewise, ones where negative, into out_scales [num_tiles, R].
    """
    num_w = tl.cdiv(width * UNIT, BLOCK_W)
    w_block = tl.program_id(0) % num_w
    r = tl.program_id(0) // num_w * BLOCK_R + tl.arange(0, BLOCK_R)
    w = w_block * BLOCK_W + tl.arange(0, BLOCK_W)
    n = tl.load(sources + r, mask=r < R, other=-1)
    inside = (w < width * UNIT)[None, :]
    words = tl.load(x + n[:, None] * (stride * UNIT) + w[None, :], mask=(n >= 0)[:, None] & inside, other=0)
    tl.store(out + r.to(tl.int64)[:, None] * (width * UNIT) + w[None, :], words, mask=(r < R)[:, None] & inside)
    if FP8:
        t = w_block * BLOCK_T + tl.arange(0, BLOCK_T)
        t_far, mask = t.to(tl.int64)[:, None], (t < num_tiles)[:, None] & (r < R)[None, :]
        where = scales + n[None, :] * scale_stride_n + t_far * scale_stride_t
        scale = tl.load(where, mask=mask & (n >= 0)[None, :], other=1.0)
        tl.store(out_scales + t_far * R + r[None, :], scale, mask=mask)


@triton.jit
def sum_kernel(
    y, row_of_slot, out, N, width, stride, out_stride,
    DTYPE: tl.constexpr, TOPK: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [N, width] = sum over k of y [R, width] at row_of_slot [N, TOPK]; width and strides in UNIT values."""
    num_d = tl.cdiv(width * UNIT, BLOCK_D)
    n = tl.program_id(0) // num_d * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(0) % num_d * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (d < width * UNIT)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for k in tl.static_range(TOPK):
        row = tl.load(row_of_slot + n * TOPK + k, mask=n < N, other=-1).to(tl.int64)
        where = y + row[:, None] * (stride * UNIT) + d[None, :]
        total += tl.load(where, mask=(row >= 0)[:, None] & inside, other=0.0).to(tl.float32)
    where = out + n.to(tl.int64)[:, None] * (out_stride * UNIT) + d[None, :]
    tl.store(where, encode.to_output(total, DTYPE), mask=(n < N)[:, None] & inside)


@triton.jit
def cast_kernel(
    x, row_of_slot, slots, codes, scales, N, R, width, stride, floor,
    POWER_OF_TWO: tl.constexpr, TOPK: tl.constexpr, MULTIPLE: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """x [N, K] -> codes [R, K], scales [ceil(K/128), R] of its copies, K = width * MULTIPLE; stride in UNIT values.

    The first programs cast rows of x, the rest look for padding among the R rows and write it.
    """
    K = width * MULTIPLE
    num_tiles, num_m = tl.cdiv(K, encode.TILE), tl.cdiv(N, BLOCK_M)
    tile, block = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    k = tile * encode.TILE + tl.arange(0, encode.TILE)
    inside = (k < K)[None, :]
    scales += tile.to(tl.int64) * R
    if block < num_m:
        m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        where = x + m.to(tl.int64)[:, None] * (stride * UNIT) + k[None, :]
        value = tl.load(where, mask=(m < N)[:, None] & inside, other=0.0).to(tl.float32)
        bits = tl.max(encode.magnitude_bits(value), axis=1)
        scale = encode.scale_of(bits, floor, encode.E4M3_MAX, POWER_OF_TWO)
        code = encode.to_e4m3(value * encode.inverse_of(scale)[:, None])
        for s in tl.static_range(TOPK):
            row = tl.load(row_of_slot + m * TOPK + s, mask=m < N, other=-1).to(tl.int64)
            tl.store(codes + row[:, None] * K + k[None, :], code, mask=(row >= 0)[:, None] & inside)
            tl.store(scales + row, scale, mask=row >= 0)
    else:
        r = ((block - num_m) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        empty = tl.load(slots + r, mask=r < R, other=0) < 0
        nothing = encode.to_e4m3(tl.zeros((BLOCK_M, encode.TILE), tl.float32))
        tl.store(codes + r[:, None] * K + k[None, :], nothing, mask=empty[:, None] & inside)
        tl.store(scales + r, tl.full((BLOCK_M,), 1.0, tl.float32), mask=empty)


def plan_rows(
    topk_ids: Tensor,
    num_experts: int,
    *,
    align: int = 128,
    room: int | None = None,
    first: int | None = None,
    order: Tensor | None = None,
) -> RowMap:
    return plan_groups(topk_ids, num_experts, align, room=room, first=first or 0, order=order)


def plan_groups(
    ids: Tensor,
    num_groups: int,
    align: int,
    *,
    room: int | None,
    first: int = 0,
    order: Tensor | None = None,
    fixed: bool = False,
) -> RowMap:
    """See the public `plan_rows`. fixed: groups of `align` rows each, cut where they are longer."""
    (n, topk), device = ids.shape, ids.device
    num_blocks, kind = ceil_div(n * topk, PLAN_COPIES), (order is not None, ids.dtype is torch.int16)
    counts = torch.empty(num_groups, num_blocks, dtype=torch.int32, device=device)
    tokens_per_expert = torch.empty(num_groups, dtype=torch.int64, device=device)
    if num_blocks:
        _count_launch(n, topk, ids.stride(), first, num_groups, *kind)(ids, order, counts)
    _scan_launch(num_groups, num_blocks)(counts, tokens_per_expert)
    if room is None:  # the one wait for the device
        room = int(((tokens_per_expert + (align - 1)) // align * align).sum())
    slot_R = torch.empty(room, dtype=torch.int64, device=device)
    source_R = torch.empty(room, dtype=torch.int64, device=device)
    row_of_slot = torch.empty(n * topk, dtype=torch.int32, device=device)
    group_offsets = torch.empty(num_groups + 1, dtype=torch.int32, device=device)
    launch_on = _place_launch(n, topk, ids.stride(), first, num_groups, *kind, room, align, fixed)
    launch_on(ids, order, counts, tokens_per_expert, slot_R, source_R, row_of_slot, group_offsets)
    return RowMap(source_R, slot_R, group_offsets, tokens_per_expert, row_of_slot, n, topk)


@by_shapes
def _count_launch(
    n: int, topk: int, strides: tuple[int, ...], first: int, num_groups: int, ordered: bool, inverted: bool
) -> Prepared:
    num_blocks = ceil_div(n * topk, PLAN_COPIES)
    return Prepared(
        count_kernel, (num_blocks, ceil_div(num_groups, PLAN_EXPERTS)), n * topk, max(topk, 1), *strides,
        first, num_groups, num_blocks, ORDERED=ordered, INVERTED=inverted, BLOCK_P=PLAN_COPIES, BLOCK_E=PLAN_EXPERTS,
        num_warps=NUM_WARPS,
    )  # fmt: skip


@by_shapes
def _scan_launch(num_groups: int, num_blocks: int) -> Prepared:
    return Prepared(scan_kernel, (num_groups,), num_blocks, BLOCK_B=PLAN_BLOCKS, num_warps=NUM_WARPS)


@by_shapes
def _place_launch(
    n: int, topk: int, strides: tuple[int, ...], first: int, num_groups: int, ordered: bool, inverted: bool,
    room: int, align: int, fixed: bool,
) -> Prepared:  # fmt: skip
    num_blocks = ceil_div(n * topk, PLAN_COPIES)
    return Prepared(
        place_kernel, (max(num_blocks + ceil_div(room, PLAN_COPIES), 1),), n * topk, max(topk, 1), *strides,
        first, num_groups, num_blocks, room, align, ORDERED=ordered, INVERTED=inverted, FIXED=fixed,
        BLOCK_P=PLAN_COPIES, BLOCK_E=PLAN_EXPERTS, num_warps=NUM_WARPS,
    )  # fmt: skip


def permute(x: Rows, row_map: RowMap) -> Rows:
    r = row_map.source_R.shape[0]
    if isinstance(x, Fp8Tensor):
        rows = empty_rows(r, x.shape[1], x.device)
        _copy(x.data, rows.data, row_map.source_R, x.scale, rows.scale)
        return rows
    out = torch.empty(r, *x.shape[1:], dtype=x.dtype, device=x.device)
    if x.dim() == 2:
        _copy(x, out, row_map.source_R, None, None)
    elif out.numel():
        _copy(x.reshape(x.shape[0], out[0].numel()), out.view(r, -1), row_map.source_R, None, None)
    return out


def permute_quantize(
    x: Tensor, row_map: RowMap, *, amax_floor: float = ACTIVATION_AMAX_FLOOR, power_of_two: bool = False
) -> Fp8Tensor:
    (n, k), r = x.shape, row_map.slot_R.shape[0]
    rows = empty_rows(r, k, x.device)
    if r and k:
        x = last_dim_contiguous(x)
        unit = vector_bytes(x) // x.element_size()
        launch_on = _cast_launch(n, r, k, x.stride(0), unit, row_map.topk, amax_floor, power_of_two)
        launch_on(x, row_map.row_of_slot, row_map.slot_R, rows.data, rows.scale)
    return rows


@by_shapes
def _cast_launch(
    n: int, r: int, k: int, stride: int, unit: int, topk: int, amax_floor: float, power_of_two: bool
) -> Prepared:
    programs = (ceil_div(n, CAST_ROWS) + ceil_div(r, CAST_ROWS)) * ceil_div(k, TILE)
    return Prepared(
        cast_kernel, (programs,), n, r, k // SIZE_MULTIPLE, stride // unit, amax_floor, POWER_OF_TWO=power_of_two,
        TOPK=topk, MULTIPLE=SIZE_MULTIPLE, UNIT=unit, BLOCK_M=CAST_ROWS, num_warps=NUM_WARPS,
    )  # fmt: skip


def unpermute(y_R: Tensor, row_map: RowMap, *, out: Tensor | None = None) -> Tensor:
    n, d = row_map.num_rows, y_R.shape[1]
    if out is None:
        out = torch.empty(n, d, dtype=y_R.dtype, device=y_R.device)
    if out.numel():
        y_R = last_dim_contiguous(y_R)
        unit = math.gcd(vector_bytes(y_R), vector_bytes(out)) // y_R.element_size()
        launch_on = _sum_launch(n, d, y_R.stride(0), out.stride(0), unit, row_map.topk, y_R.dtype)
        launch_on(y_R, row_map.row_of_slot, out)
    return out


@by_shapes
def _sum_launch(n: int, d: int, stride: int, out_stride: int, unit: int, topk: int, dtype: torch.dtype) -> Prepared:
    block_n, block_d = sum_block(d)
    return Prepared(
        sum_kernel, (ceil_div(n, block_n) * ceil_div(d, block_d),), n, d // unit, stride // unit, out_stride // unit,
        DTYPE=TL_DTYPE[dtype], TOPK=topk, UNIT=unit, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=NUM_WARPS,
    )  # fmt: skip


def vector_bytes(x: Tensor) -> int:
    """The widest access, up to 16 bytes, on whose multiples all rows of x [N, D] (D contiguous) begin and end."""
    size, (_, width), (stride, _) = x.element_size(), x.shape, x.stride()
    return math.gcd(VECTOR, x.data_ptr(), x.storage_offset() * size, width * size, stride * size)


def _copy(x: Tensor, out: Tensor, source_R: Tensor, scale: Tensor | None, out_scale: Tensor | None) -> None:
    """out [R, D], contiguous, = x [N, D] at source_R, with the scales of FP8 rows."""
    if out.numel() == 0:
        return
    x = last_dim_contiguous(x)
    (r, d), size, vector = out.shape, x.element_size(), vector_bytes(x)
    launch_on = _copy_launch(
        r, d, size, vector, x.stride(0), (0, 0) if scale is None else scale.stride(), scale is not None
    )
    word = WORDS[min(vector, 4)]
    launch_on(x.view(word), scale, source_R, out.view(word), out_scale)


@by_shapes
def _copy_launch(
    r: int, d: int, size: int, vector: int, stride: int, scale_strides: tuple[int, ...], fp8: bool
) -> Prepared:
    """size: bytes of a value, vector: bytes of an access."""
    word = min(vector, 4)
    unit, width = vector // word, d * size // word
    block_r, block_w = copy_block(width, word)
    return Prepared(
        copy_kernel, (ceil_div(r, block_r) * ceil_div(width, block_w),), r, width // unit, stride * size // vector,
        *scale_strides, ceil_div(d, TILE), FP8=fp8, UNIT=unit, BLOCK_R=block_r, BLOCK_W=block_w,
        BLOCK_T=block_w * word // TILE, num_warps=NUM_WARPS,
    )  # fmt: skip
