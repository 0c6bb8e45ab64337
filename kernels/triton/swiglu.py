"""SwiGLU in Triton, fused with its casts: forward, its columns again, backward. One launch each.

Forward casts gate, up and h of a [BLOCK_M, 128] tile in one program and reads its input once. Backward writes rows and
columns, each from loads and casts of its own (see `quantize`: one cast feeds one store). Its programs come 128 rows at
a time, first those that write rows, then those that write columns, so that the second load of a value finds it in L2.
The gradient of a routing weight is a sum over all of F: the program of its rows passes over F and adds in that order,
without atomics or partial sums in memory. Without weights a program has one tile of F. `columns` says how a program
holds what it writes as columns.

Where F is no multiple of 128, a tile of the cached rows may hold the end of gate and the start of up: forward and the
rows of backward then go tile by tile of the wide tensor, which loads values again.

Numerics: FP32 inside, one rounding at the cast. The sigmoid is the hardware's (`encode.sigmoid`), not the
specification's to the bit: casts of what holds no sigmoid are bit-equal, other codes are those of a value within the
bound that `encode.sigmoid` states, a neighbour of the specification's where that value lies on a rounding boundary.
Matching it to the bit was refused: a CPU's and a GPU's PyTorch differ there as well, and a polynomial with an exact
division would double the arithmetic of kernels that have about as much of it as memory leaves time for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.device_layout import empty_columns, empty_rows
from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR, GRADIENT_AMAX_FLOOR, SIZE_MULTIPLE, TILE, Fp8Tensor, ceil_div
from fp8moe.kernels.triton import encode
from fp8moe.kernels.triton.activation import activated, differentiate
from fp8moe.kernels.triton.columns import (
    cast_columns,
    column_block,
    load_factors,
    load_tokens,
    quarter_stride,
    scale_at,
)
from fp8moe.kernels.triton.groups import group_of, group_width
from fp8moe.kernels.triton.launch import Prepared, by_shapes
from fp8moe.kernels.triton.quantize import cast_rows, last_dim_contiguous

NUM_WARPS = 4
ROWS_BLOCK_M = 16  # of a program that writes rows
COLUMNS_BLOCK_K = 64  # of a program that recomputes columns
BACKWARD_BLOCK_K = 32  # of one that writes columns of both gradients
BACKWARD_REGISTERS = 128  # of a lane, 136 if it had them: four programs an SM for three
MULTIPLE = tl.constexpr(SIZE_MULTIPLE)


@triton.jit
def weight_of(weights, m, R):
    """The routing weights of rows m."""
    return tl.load(weights + m, mask=m < R, other=0.0)


@triton.jit
def biased(value, bias, k, inside):
    """value [BLOCK_M, BLOCK_K] plus the bias at columns k, where `inside`."""
    return value + tl.load(bias + k, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["R", "F"])
def swiglu_kernel(
    gate_up, weights, bias, offsets, h, h_scale, cached, cached_scale, R, F, stride_m, floor,
    POWER_OF_TWO: tl.constexpr, ALIGNED: tl.constexpr, LIMIT: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """gate_up [R, 2F] -> rows of h [R, F] and of gate_up, scales [tiles, R]; ALIGNED: F is a multiple of 128.

    bias [E, 2F], of the expert of the rows by `offsets` [E + 1], is added first; rows past the last have none.
    """
    F *= MULTIPLE
    h_tiles = tl.cdiv(F, encode.TILE)
    num_tiles = h_tiles if ALIGNED else h_tiles + tl.cdiv(2 * F, encode.TILE)
    tile = tl.program_id(0) % num_tiles
    m = tl.program_id(0) // num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile * encode.TILE + tl.arange(0, encode.TILE)
    row = gate_up + m.to(tl.int64)[:, None] * stride_m
    if bias is not None:
        group = group_of(offsets, tl.program_id(0) // num_tiles * BLOCK_M, E, WIDTH)
        bias += group.to(tl.int64) * 2 * F
        grouped = group < E
    if ALIGNED or tile < h_tiles:
        mask = (m < R)[:, None] & (k < F)[None, :]
        gate = tl.load(row + k[None, :], mask=mask, other=0.0).to(tl.float32)
        up = tl.load(row + F + k[None, :], mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            inside = (k < F) & grouped
            gate, up = biased(gate, bias, k, inside), biased(up, bias, F + k, inside)
        if ALIGNED:
            cast_rows(gate, cached, cached_scale, m, k, tile, R, 2 * F, floor, POWER_OF_TWO)
            cast_rows(up, cached, cached_scale, m, F + k, h_tiles + tile, R, 2 * F, floor, POWER_OF_TWO)
        product = activated(gate, up, LIMIT)
        if weights is not None:
            product *= weight_of(weights, m, R)[:, None]
        cast_rows(product, h, h_scale, m, k, tile, R, F, floor, POWER_OF_TWO)
    else:
        k -= h_tiles * encode.TILE
        value = tl.load(row + k[None, :], mask=(m < R)[:, None] & (k < 2 * F)[None, :], other=0.0).to(tl.float32)
        if bias is not None:
            value = biased(value, bias, k, (k < 2 * F) & grouped)
        cast_rows(value, cached, cached_scale, m, k, tile - h_tiles, R, 2 * F, floor, POWER_OF_TWO)


@triton.jit(do_not_specialize=["R", "F", "quarter_m", "scale_stride_k"])
def swiglu_columns_kernel(
    codes, scales, weights, columns, columns_scale, R, F, quarter_m, scale_stride_m, scale_stride_k, floor,
    LIMIT: tl.constexpr, BLOCK_K: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """FP8 rows [R, 2F] -> columns of h [F, R], scales powers of two. R and F in units of 16."""
    R, F = R * MULTIPLE, F * MULTIPLE
    num_k = tl.cdiv(F, BLOCK_K)
    block, first = tl.program_id(0) // num_k, tl.program_id(0) % num_k * BLOCK_K
    k = first + tl.arange(0, BLOCK_K)
    gate_scale = load_factors(scales + scale_at(first, scale_stride_k), block, scale_stride_m, R, OWN)
    up_scale = load_factors(scales + scale_at(F + first, scale_stride_k), block, scale_stride_m, R, OWN)
    if weights is not None and LIMIT is None:
        up_scale *= load_factors(weights, block, 1, R, OWN)
    gate = load_tokens(codes, block, k, quarter_m, R, F, OWN) * gate_scale
    up = load_tokens(codes + F, block, k, quarter_m, R, F, OWN) * up_scale
    product = activated(gate, up, LIMIT)
    if weights is not None and LIMIT is not None:  # (up + 1) takes no factor beforehand
        product *= load_factors(weights, block, 1, R, OWN)
    cast_columns(product, columns, columns_scale, block, first, R, F, F, floor, True, OWN)


@triton.jit
def decoded_row(codes, scales, m, k, tile, scale_stride_m, scale_stride_k, mask, M, ALIGNED: tl.constexpr):
    """FP8 rows m at columns k, FP32; ALIGNED: all of scale tile `tile`. `codes` are already at the rows."""
    code = tl.load(codes + k[None, :], mask=mask, other=0.0).to(tl.float32)
    scales += m.to(tl.int64)[:, None] * scale_stride_m
    if ALIGNED:
        return code * tl.load(scales + tl.cast(tile, tl.int64) * scale_stride_k, mask=(m < M)[:, None], other=1.0)
    of_each = (k // encode.TILE).to(tl.int64)[None, :]
    return code * tl.load(scales + of_each * scale_stride_k, mask=mask, other=1.0)


@triton.jit
def write_gradient_rows(
    dy, codes, scales, weights, rows, rows_scale, m, t, R, F, stride_dy, stride_m, scale_stride_m, scale_stride_k,
    floor, POWER_OF_TWO: tl.constexpr, ALIGNED: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Tile t of d gate_up's rows m, ALIGNED: of d gate's and of d up's; returns its part of d weight [BLOCK_M]."""
    wide = t * encode.TILE + tl.arange(0, encode.TILE)  # a column of d gate_up
    k = wide if ALIGNED else tl.where(wide < F, wide, wide - F)
    mask = (m < R)[:, None] & (wide < 2 * F)[None, :]
    here = codes + m.to(tl.int64)[:, None] * stride_m
    gate = decoded_row(here, scales, m, k, t, scale_stride_m, scale_stride_k, mask, R, ALIGNED)
    up = decoded_row(here, scales, m, F + k, F // encode.TILE + t, scale_stride_m, scale_stride_k, mask, R, ALIGNED)
    where = dy + m.to(tl.int64)[:, None] * stride_dy + k[None, :]
    d_gate, d_up, d_weight = differentiate(gate, up, tl.load(where, mask=mask, other=0.0).to(tl.float32), LIMIT)
    if weights is not None:
        weight = weight_of(weights, m, R)[:, None]
        d_gate, d_up = d_gate * weight, d_up * weight
    if ALIGNED:
        cast_rows(d_gate, rows, rows_scale, m, k, t, R, 2 * F, floor, POWER_OF_TWO)
        cast_rows(d_up, rows, rows_scale, m, F + k, F // encode.TILE + t, R, 2 * F, floor, POWER_OF_TWO)
        return tl.sum(d_weight, axis=1)
    value = tl.where(mask, tl.where((wide < F)[None, :], d_gate, d_up), 0.0)
    cast_rows(value, rows, rows_scale, m, wide, t, R, 2 * F, floor, POWER_OF_TWO)
    return tl.sum(tl.where(mask & (wide < F)[None, :], d_weight, 0.0), axis=1)


@triton.jit
def write_gradient_columns(
    dy, codes, scales, weights, columns, columns_scale, block, first, R, F, quarter_dy, quarter_m, scale_stride_m,
    scale_stride_k, floor, POWER_OF_TWO: tl.constexpr, LIMIT: tl.constexpr, BLOCK_K: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Columns of d gate and of d up, BLOCK_K each from `first` on, of a block of 128 tokens."""
    k = first + tl.arange(0, BLOCK_K)
    gate_scale = load_factors(scales + scale_at(first, scale_stride_k), block, scale_stride_m, R, OWN)
    up_scale = load_factors(scales + scale_at(F + first, scale_stride_k), block, scale_stride_m, R, OWN)
    gradient = load_tokens(dy, block, k, quarter_dy, R, F, OWN)
    if weights is not None:
        gradient *= load_factors(weights, block, 1, R, OWN)
    gate = load_tokens(codes, block, k, quarter_m, R, F, OWN) * gate_scale
    up = load_tokens(codes + F, block, k, quarter_m, R, F, OWN) * up_scale
    d_gate, d_up, _ = differentiate(gate, up, gradient, LIMIT)
    cast_columns(d_gate, columns, columns_scale, block, first, R, 2 * F, F, floor, POWER_OF_TWO, OWN)
    cast_columns(d_up, columns, columns_scale, block, F + first, R, 2 * F, 2 * F, floor, POWER_OF_TWO, OWN)


@triton.jit(do_not_specialize=["R", "F", "tiles", "quarter_dy", "quarter_m", "scale_stride_k"])
def swiglu_backward_kernel(
    dy, codes, scales, weights, rows, rows_scale, columns, columns_scale, d_weights, R, F, tiles, stride_dy, stride_m,
    quarter_dy, quarter_m, scale_stride_m, scale_stride_k, floor, POWER_OF_TWO: tl.constexpr, ALIGNED: tl.constexpr,
    LIMIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """dy [R, F], FP8 rows [R, 2F] -> d gate_up as rows [R, 2F] and columns [2F, R], d weights [R].

    A program that writes rows has `tiles` tiles of them. R and F in units of 16.
    """
    R, F = R * MULTIPLE, F * MULTIPLE
    row_blocks: tl.constexpr = encode.TILE // BLOCK_M
    num_tiles = F // encode.TILE if ALIGNED else tl.cdiv(2 * F, encode.TILE)
    row_programs = tl.cdiv(num_tiles, tiles) * row_blocks
    num_programs = row_programs + tl.cdiv(F, BLOCK_K)
    block, i = tl.program_id(0) // num_programs, tl.program_id(0) % num_programs
    if i < row_programs:
        m = block * encode.TILE + i % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        start = i // row_blocks * tiles
        total = tl.zeros((BLOCK_M,), tl.float32)
        for t in range(start, tl.minimum(start + tiles, num_tiles)):
            total += write_gradient_rows(
                dy, codes, scales, weights, rows, rows_scale, m, t, R, F, stride_dy, stride_m, scale_stride_m,
                scale_stride_k, floor, POWER_OF_TWO, ALIGNED, LIMIT,
            )  # fmt: skip
        if weights is not None:
            tl.store(d_weights + m, total, mask=m < R)
    else:
        write_gradient_columns(
            dy, codes, scales, weights, columns, columns_scale, block, (i - row_programs) * BLOCK_K, R, F, quarter_dy,
            quarter_m, scale_stride_m, scale_stride_k, floor, POWER_OF_TWO, LIMIT, BLOCK_K, OWN,
        )  # fmt: skip


def swiglu(
    gate_up: Tensor,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    group_offsets: Tensor | None = None,
    *,
    limit: float | None = None,
    power_of_two: bool = False,
) -> tuple[Fp8Tensor, Fp8Tensor]:
    (r, both), device = gate_up.shape, gate_up.device
    f = both // 2
    out, cached = empty_rows(r, f, device), empty_rows(r, both, device)
    if r and both:
        gate_up = last_dim_contiguous(gate_up)
        experts = None if bias is None else bias.shape[0]
        launch_on = _swiglu_launch(r, f, gate_up.stride(0), experts, limit, power_of_two)
        launch_on(
            gate_up, _contiguous(weights), _contiguous(bias), _contiguous(group_offsets), out.data, out.scale,
            cached.data, cached.scale,
        )  # fmt: skip
    return out, cached


@by_shapes
def _swiglu_launch(
    r: int, f: int, stride: int, experts: int | None, limit: float | None, power_of_two: bool
) -> Prepared:
    aligned = f % TILE == 0
    num_tiles = ceil_div(f, TILE) + (0 if aligned else ceil_div(2 * f, TILE))
    return Prepared(
        swiglu_kernel, (ceil_div(r, ROWS_BLOCK_M) * num_tiles,), r, f // SIZE_MULTIPLE, stride, ACTIVATION_AMAX_FLOOR,
        POWER_OF_TWO=power_of_two, ALIGNED=aligned, LIMIT=limit, E=experts or 0,
        WIDTH=0 if experts is None else group_width(experts), BLOCK_M=ROWS_BLOCK_M, num_warps=NUM_WARPS,
    )  # fmt: skip


def swiglu_columns(cached: Fp8Tensor, weights: Tensor | None = None, *, limit: float | None = None) -> Fp8Tensor:
    r, both = cached.shape
    f = both // 2
    columns = empty_columns(r, f, cached.device)
    if r and f:
        data, quarter = quarter_stride(cached.data)
        launch_on = _columns_launch(r, f, quarter, cached.scale.stride(), limit)
        launch_on(data, cached.scale, _contiguous(weights), columns.data, columns.scale)
    return columns


@by_shapes
def _columns_launch(r: int, f: int, quarter: int, scale_strides: tuple[int, ...], limit: float | None) -> Prepared:
    block_k, own = column_block(f, COLUMNS_BLOCK_K, NUM_WARPS)
    return Prepared(
        swiglu_columns_kernel, (ceil_div(r, TILE) * ceil_div(f, block_k),), r // SIZE_MULTIPLE, f // SIZE_MULTIPLE,
        quarter, *scale_strides, ACTIVATION_AMAX_FLOOR, LIMIT=limit, BLOCK_K=block_k, OWN=own,
        num_warps=NUM_WARPS,
    )  # fmt: skip


def swiglu_backward(
    dy: Tensor,
    cached: Fp8Tensor,
    weights: Tensor | None = None,
    *,
    limit: float | None = None,
    power_of_two: bool = False,
) -> tuple[Fp8Tensor, Fp8Tensor, Tensor | None]:
    (r, both), device = cached.shape, dy.device
    f = both // 2
    rows, columns = empty_rows(r, both, device), empty_columns(r, both, device)
    d_weights = None if weights is None else torch.empty(r, dtype=torch.float32, device=device)
    if r and f:
        (dy, quarter_dy), (data, quarter) = quarter_stride(dy), quarter_stride(cached.data)
        launch_on = _backward_launch(
            r, f, dy.stride(0), data.stride(0), quarter_dy, quarter, cached.scale.stride(), d_weights is not None,
            limit, power_of_two,
        )  # fmt: skip
        outputs = rows.data, rows.scale, columns.data, columns.scale, d_weights
        launch_on(dy, data, cached.scale, _contiguous(weights), *outputs)
    elif d_weights is not None:
        d_weights.zero_()
    return rows, columns, d_weights


@by_shapes
def _backward_launch(
    r: int, f: int, stride_dy: int, stride: int, quarter_dy: int, quarter: int,
    scale_strides: tuple[int, ...], weighted: bool, limit: float | None, power_of_two: bool,
) -> Prepared:  # fmt: skip
    aligned = f % TILE == 0
    num_tiles = f // TILE if aligned else ceil_div(2 * f, TILE)
    tiles = num_tiles if weighted else 1
    block_k, own = column_block(f, BACKWARD_BLOCK_K, NUM_WARPS)
    programs = ceil_div(num_tiles, tiles) * (TILE // ROWS_BLOCK_M) + ceil_div(f, block_k)
    return Prepared(
        swiglu_backward_kernel, (ceil_div(r, TILE) * programs,), r // SIZE_MULTIPLE, f // SIZE_MULTIPLE, tiles,
        stride_dy, stride, quarter_dy, quarter, *scale_strides, GRADIENT_AMAX_FLOOR,
        POWER_OF_TWO=power_of_two, ALIGNED=aligned, LIMIT=limit, BLOCK_M=ROWS_BLOCK_M, BLOCK_K=block_k, OWN=own,
        num_warps=NUM_WARPS, maxnreg=BACKWARD_REGISTERS,
    )  # fmt: skip


def _contiguous(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.contiguous()
