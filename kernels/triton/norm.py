"""RMSNorm in Triton: one pass forward, one pass and a small sum backward, columns straight from the input.

Forward: a program holds whole rows as [BLOCK_M, TILES, 128]: the sum of squares is over the last two dims, a tile's
amax over the last, so that rows in FP8 leave in the pass that norms them. The sum of a single row passes through a
scalar, which has no layout: Triton 3.6 would add a tensor's twice, for y and for the codes, in two orders, and y would
not be that of the stored 1/rms; inline assembly behind the sum is copied with it, pure or not. Columns: the input's
tile is loaded as [BLOCK_K, 128], like that of `quantize`, and normed with the kept 1/rms: forward's products, hence
forward's y.

Backward: a fixed number of programs, each with every PROGRAMS-th block of rows. A program keeps its share of the gain's
gradient in registers and writes it once; a second launch adds the shares in their order. Atomics were refused: their
order is the device's. A program a row, as forward has, was refused: it would write as many shares as there are rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.device_layout import empty_columns, empty_rows
from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR, SIZE_MULTIPLE, TILE, Fp8Tensor, ceil_div, next_power_of_2
from fp8moe.kernels.triton import encode
from fp8moe.kernels.triton.gemm import TL_DTYPE
from fp8moe.kernels.triton.launch import Prepared, by_shapes
from fp8moe.kernels.triton.quantize import COLUMNS_BLOCK_K, NUM_WARPS, last_dim_contiguous, write_columns

HELD = 4096  # values a program holds where its rows are shorter
VALUES_A_WARP = 512
PROGRAMS = 256  # of backward: two for each of the 132 SMs of an H100
BACKWARD_HELD = 4096
NARROW = 8192  # features up to which a program of backward has registers for the gain, and in BF16 for the next rows
SUMMED_SHARES, SUMMED_FEATURES = 32, 64


@triton.jit(do_not_specialize=["M"])
def norm_kernel(
    x, delta, weight, h, y, codes, scales, inverse_rms, M, D, stride_x, stride_delta, eps, floor,
    ADD: tl.constexpr, TENSOR: tl.constexpr, ROWS: tl.constexpr, POWER_OF_TWO: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """x [M, D] (+ delta -> h) -> 1/rms [M]; y [M, D] if TENSOR; codes [M, D], scales [ceil(D/128), M] if ROWS."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_far = m.to(tl.int64)
    tile = tl.arange(0, TILES)
    k = (tile[:, None] * encode.TILE + tl.arange(0, encode.TILE)[None, :])[None, :, :]
    mask = (m < M)[:, None, None] & (k < D)
    value = tl.load(x + m_far[:, None, None] * stride_x + k, mask=mask, other=0.0).to(tl.float32)
    here = m_far[:, None, None] * D + k
    if ADD:
        value += tl.load(delta + m_far[:, None, None] * stride_delta + k, mask=mask, other=0.0).to(tl.float32)
        rounded = encode.to_output(value, DTYPE)
        tl.store(h + here, rounded, mask=mask)
        value = rounded.to(tl.float32)
    total = tl.sum(tl.sum(value * value, axis=2), axis=1)
    if BLOCK_M == 1:
        total = tl.full((1,), tl.sum(total, axis=0), tl.float32)
    mean = tl.div_rn(total, tl.full(total.shape, 0.0, tl.float32) + D)
    r = encode.inverse_of(tl.sqrt_rn(mean + eps))
    tl.store(inverse_rms + m, r, mask=m < M)
    gain = tl.load(weight + k, mask=k < D, other=0.0).to(tl.float32)
    normed = encode.to_output(value * r[:, None, None] * gain, DTYPE)
    if TENSOR:
        tl.store(y + here, normed, mask=mask)
    if ROWS:
        value = normed.to(tl.float32)
        scale = encode.scale_of(tl.max(encode.magnitude_bits(value), axis=2), floor, encode.E4M3_MAX, POWER_OF_TWO)
        tl.store(codes + here, encode.to_e4m3(value * encode.inverse_of(scale)[:, :, None]), mask=mask)
        where = scales + tile.to(tl.int64)[None, :] * M + m[:, None]
        tl.store(where, scale, mask=(m < M)[:, None] & (tile * encode.TILE < D)[None, :])


@triton.jit(do_not_specialize=["length"])
def norm_columns_kernel(
    x, weight, inverse_rms, columns, columns_scale, length, K, stride_m, floor,
    MULTIPLE: tl.constexpr, POWER_OF_TWO: tl.constexpr, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [M, K], 1/rms [M] -> the columns of y, M = length * MULTIPLE."""
    M = length * MULTIPLE
    m = tl.program_id(0) * encode.TILE + tl.arange(0, encode.TILE)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (k < K)[:, None] & (m < M)[None, :]
    value = tl.load(x + m.to(tl.int64)[None, :] * stride_m + k[:, None], mask=mask, other=0.0).to(tl.float32)
    r = tl.load(inverse_rms + m, mask=m < M, other=0.0)
    gain = tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)
    normed = encode.to_output(value * r[None, :] * gain[:, None], DTYPE).to(tl.float32)
    write_columns(normed, columns, columns_scale, m, k, M, K, floor, POWER_OF_TWO)


@triton.jit
def load_both(dy, x, m, k, M, D, stride_dy, stride_x):
    """Rows m [BLOCK_M] of dy and of x, as they are."""
    m_far = m.to(tl.int64)[:, None]
    mask = (m < M)[:, None] & (k < D)
    grad = tl.load(dy + m_far * stride_dy + k, mask=mask, other=0.0)
    return grad, tl.load(x + m_far * stride_x + k, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["M", "num_programs"])
def norm_backward_kernel(
    dy, x, weight, inverse_rms, residual, dx, shares, M, D, num_programs, stride_dy, stride_x, stride_residual,
    RESIDUAL: tl.constexpr, HOLD_GAIN: tl.constexpr, PREFETCH: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx [M, D] of dy and x [M, D], plus residual; shares [num_programs, D]: this program's sum of dy x r.

    PREFETCH: the next rows are on their way while these are computed.
    """
    k = tl.arange(0, BLOCK_D)[None, :]
    if HOLD_GAIN:
        gain = tl.load(weight + k, mask=k < D, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if PREFETCH:
        next_grad, next_value = load_both(dy, x, m, k, M, D, stride_dy, stride_x)
    for _ in range(tl.program_id(0) * BLOCK_M, M, num_programs * BLOCK_M):
        if PREFETCH:
            grad, value = next_grad.to(tl.float32), next_value.to(tl.float32)
            next_grad, next_value = load_both(dy, x, m + num_programs * BLOCK_M, k, M, D, stride_dy, stride_x)
        else:
            grad, value = load_both(dy, x, m, k, M, D, stride_dy, stride_x)
            grad, value = grad.to(tl.float32), value.to(tl.float32)
        m_far = m.to(tl.int64)[:, None]
        mask = (m < M)[:, None] & (k < D)
        if RESIDUAL:
            other = tl.load(residual + m_far * stride_residual + k, mask=mask, other=0.0)
        r = tl.load(inverse_rms + m, mask=m < M, other=0.0)[:, None]
        value *= r
        total += grad * value
        if not HOLD_GAIN:  # volatile, or the compiler would hold it all the same, and spill
            gain = tl.load(weight + k, mask=k < D, other=0.0, volatile=True).to(tl.float32)
        grad *= gain
        along = tl.sum(grad * value, axis=1) / D
        out = (grad - value * along[:, None]) * r
        if RESIDUAL:
            out += other.to(tl.float32)
        tl.store(dx + m_far * D + k, encode.to_output(out, DTYPE), mask=mask)
        m += num_programs * BLOCK_M
    features = tl.arange(0, BLOCK_D)
    where = shares + tl.program_id(0).to(tl.int64) * D + features
    tl.store(where, tl.sum(total, axis=0), mask=features < D)


@triton.jit(do_not_specialize=["P"])
def gain_kernel(shares, main_grad, P, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """main_grad [D] += the sum of shares [P, D]."""
    k = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        where = shares + p.to(tl.int64)[:, None] * D + k[None, :]
        total += tl.load(where, mask=(p < P)[:, None] & (k < D)[None, :], other=0.0)
    before = tl.load(main_grad + k, mask=k < D, other=0.0)
    tl.store(main_grad + k, before + tl.sum(total, axis=0), mask=k < D)


def block_of(width: int, held: int) -> tuple[int, int, int]:
    """Rows and values a row of a program for rows of `width`, and its warps; whole tiles, at least `held` values."""
    values = max(next_power_of_2(width), TILE)
    rows = max(held // values, 1)
    return rows, values, min(max(rows * values // VALUES_A_WARP, NUM_WARPS), 16)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    delta: Tensor | None = None,
    *,
    eps: float,
    tensor: bool = True,
    rows: bool = False,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor, Fp8Tensor, Tensor]:
    t, d = x.shape
    h, y = x.new_empty(0 if delta is None else t, d), x.new_empty(t if tensor else 0, d)
    q = empty_rows(t if rows else 0, d, x.device)
    inverse_rms = x.new_empty(t, dtype=torch.float32)
    if t and d:
        x = last_dim_contiguous(x)
        added, added_stride = None, 0
        if delta is not None:
            added = last_dim_contiguous(delta)
            added_stride = added.stride(0)
        launch_on = _norm_launch(
            t, d, x.stride(0), added_stride, eps, added is not None, tensor, rows, power_of_two, x.dtype
        )
        launch_on(
            x, added, weight, None if added is None else h, y if tensor else None, q.data if rows else None,
            q.scale if rows else None, inverse_rms,
        )  # fmt: skip
    return h, y, q, inverse_rms


@by_shapes
def _norm_launch(
    t: int, d: int, stride: int, added_stride: int, eps: float, add: bool, tensor: bool, rows: bool,
    power_of_two: bool, dtype: torch.dtype,
) -> Prepared:  # fmt: skip
    block_m, values, num_warps = block_of(d, HELD)
    return Prepared(
        norm_kernel, (ceil_div(t, block_m),), t, d, stride, added_stride, eps, ACTIVATION_AMAX_FLOOR, ADD=add,
        TENSOR=tensor, ROWS=rows, POWER_OF_TWO=power_of_two, DTYPE=TL_DTYPE[dtype], BLOCK_M=block_m,
        TILES=values // TILE, num_warps=num_warps,
    )  # fmt: skip


def rms_norm_columns(x: Tensor, weight: Tensor, inverse_rms: Tensor, *, power_of_two: bool = False) -> Fp8Tensor:
    t, d = x.shape
    columns = empty_columns(t, d, x.device)
    if t and d:
        x = last_dim_contiguous(x)
        launch_on = _columns_launch(t, d, x.stride(0), power_of_two, x.dtype)
        launch_on(x, weight, inverse_rms, columns.data, columns.scale)
    return columns


@by_shapes
def _columns_launch(t: int, d: int, stride: int, power_of_two: bool, dtype: torch.dtype) -> Prepared:
    return Prepared(
        norm_columns_kernel, (ceil_div(t, TILE), ceil_div(d, COLUMNS_BLOCK_K)), t // SIZE_MULTIPLE, d, stride,
        ACTIVATION_AMAX_FLOOR, MULTIPLE=SIZE_MULTIPLE, POWER_OF_TWO=power_of_two, DTYPE=TL_DTYPE[dtype],
        BLOCK_K=COLUMNS_BLOCK_K, num_warps=NUM_WARPS,
    )  # fmt: skip


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor, main_grad: Tensor, residual: Tensor | None = None
) -> Tensor:
    t, d = x.shape
    dx = torch.empty(t, d, dtype=x.dtype, device=x.device)
    if not (t and d):
        return dx
    dy, x = last_dim_contiguous(dy), last_dim_contiguous(x)
    other, other_stride = None, 0
    if residual is not None:
        other = last_dim_contiguous(residual)
        other_stride = other.stride(0)
    programs, rows_launch, gain_launch = _backward_launches(
        t, d, dy.stride(0), x.stride(0), other_stride, other is not None, x.dtype
    )
    shares = torch.empty(programs, d, dtype=torch.float32, device=x.device)
    rows_launch(dy, x, weight, inverse_rms, other, dx, shares)
    gain_launch(shares, main_grad)
    return dx


@by_shapes
def _backward_launches(
    t: int, d: int, stride_dy: int, stride_x: int, stride_residual: int, residual: bool, dtype: torch.dtype
) -> tuple[int, Prepared, Prepared]:
    """How many programs share the gain's gradient, and both launches."""
    block_m, values, num_warps = block_of(d, BACKWARD_HELD)
    programs = min(PROGRAMS, ceil_div(t, block_m))
    rows_launch = Prepared(
        norm_backward_kernel, (programs,), t, d, programs, stride_dy, stride_x, stride_residual, RESIDUAL=residual,
        HOLD_GAIN=values <= NARROW, PREFETCH=values <= NARROW and dtype.itemsize == 2, DTYPE=TL_DTYPE[dtype],
        BLOCK_M=block_m, BLOCK_D=values, num_warps=num_warps,
    )  # fmt: skip
    gain_launch = Prepared(
        gain_kernel, (ceil_div(d, SUMMED_FEATURES),), programs, d, BLOCK_P=SUMMED_SHARES, BLOCK_D=SUMMED_FEATURES,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return programs, rows_launch, gain_launch
