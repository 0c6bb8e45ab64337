"""Grouped products of unquantized rows: BF16 by PyTorch's grouped GEMM on tensor cores, FP32 by a kernel of our own.

`torch.nn.functional.grouped_mm` finds its groups on the device, one launch for all of them. It wants operands whose
rows lie on 16 bytes, so an operand that lies otherwise is copied with zeros behind its rows. It leaves rows past the
last group unwritten: a second, small launch zeros them, whose programs end at once where there are none.

The FP32 kernel numbers the tiles of rows group by group, those past the last group behind them: a program counts the
groups that end before its tile, so the host never waits for their sizes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.fp8 import ceil_div, next_power_of_2
from fp8moe.kernels.triton.gemm import choose_tile
from fp8moe.kernels.triton.launch import launch
from fp8moe.kernels.triton.wgrad import EXACT, EXACT_TOKENS, launch_wgrad

ALIGNMENT = 16  # bytes, of rows that PyTorch's grouped GEMM reads
ZERO_ROWS, ZERO_COLUMNS = 8, 1024


@triton.jit(do_not_specialize=["R"])
def grouped_mm_kernel(
    x, w, out, group_offsets, R, N, K, E, x_stride_r, x_stride_k, w_stride_e, w_stride_n, w_stride_k, stride_r,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, E_PADDED: tl.constexpr,
):  # fmt: skip
    """out [R, N] FP32: x [rows of e, K] @ w [e, N, K]^T for each group, zeros past the last."""
    row_tile, n_tile = tl.program_id(0), tl.program_id(1)
    index = tl.arange(0, E_PADDED)
    starts = tl.load(group_offsets + index, mask=index < E, other=0)
    ends = tl.load(group_offsets + index + 1, mask=index < E, other=0)
    tiles = tl.cdiv(ends - starts, BLOCK)
    e = tl.sum(((tl.cumsum(tiles, axis=0) <= row_tile) & (index < E)).to(tl.int32), axis=0)
    before = tl.sum(tl.where(index < e, tiles, 0), axis=0)
    start, end = tl.load(group_offsets + e), tl.load(group_offsets + e + 1, mask=e < E, other=0)
    rows = start + (row_tile - before) * BLOCK + tl.arange(0, BLOCK)
    n = n_tile * BLOCK + tl.arange(0, BLOCK)
    row_mask, n_mask = (rows < tl.where(e < E, end, R))[:, None], (n < N)[:, None]
    far = rows.to(tl.int64)[:, None]
    w += e.to(tl.int64) * w_stride_e
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(0, tl.where(e < E, tl.cdiv(K, BLOCK_K), 0)):
        k = (step * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
        left = tl.load(x + far * x_stride_r + k * x_stride_k, mask=row_mask & (k < K), other=0.0)
        right = tl.load(w + n.to(tl.int64)[:, None] * w_stride_n + k * w_stride_k, mask=n_mask & (k < K), other=0.0)
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
    tl.store(out + far * stride_r + n[None, :], acc, mask=row_mask & (n < N)[None, :])


@triton.jit(do_not_specialize=["R"])
def zero_rows_kernel(out, end, R, N, stride_r, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out [R, N] becomes zero from row `end` [1] on."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.load(end)
    if tl.program_id(0) * ROWS + ROWS <= first:
        return
    where = out + rows.to(tl.int64)[:, None] * stride_r
    mask = ((rows >= first) & (rows < R))[:, None]
    zeros = tl.zeros((ROWS, COLUMNS), out.dtype.element_ty)
    for column in range(0, N, COLUMNS):
        n = (column + tl.arange(0, COLUMNS))[None, :]
        tl.store(where + n, zeros, mask=mask & (n < N))


def grouped_mm(x: Tensor, w: Tensor, group_offsets: Tensor) -> Tensor:
    (r, k), (num_groups, n, _) = x.shape, w.shape
    if 0 in (r, n, k, num_groups):
        return torch.zeros(r, n, dtype=x.dtype, device=x.device)
    group_offsets = group_offsets.contiguous()
    if x.dtype is torch.float32:
        out = torch.empty(r, n, device=x.device)
        launch(
            grouped_mm_kernel, (ceil_div(r, EXACT.block_m) + num_groups + 1, ceil_div(n, EXACT.block_n)),
            x, w, out, group_offsets, r, n, k, num_groups, *x.stride(), *w.stride(), out.stride(0),
            BLOCK=EXACT.block_m, BLOCK_K=EXACT_TOKENS, E_PADDED=next_power_of_2(num_groups),
            num_warps=EXACT.warps, num_stages=EXACT.stages,
        )  # fmt: skip
        return out
    x, w = _padded(x), _padded(w)
    out = torch.nn.functional.grouped_mm(x, w.mT, offs=group_offsets[1:])[:, :n].contiguous()
    launch(
        zero_rows_kernel,
        (ceil_div(r, ZERO_ROWS),),
        out,
        group_offsets[-1:],
        r,
        n,
        out.stride(0),
        ROWS=ZERO_ROWS,
        COLUMNS=ZERO_COLUMNS,
    )
    return out


def grouped_mm_wgrad(dy: Tensor, x: Tensor, group_offsets: Tensor, main_grad: Tensor) -> None:
    n, k, num_groups = dy.shape[1], x.shape[1], main_grad.shape[0]
    if main_grad.numel() == 0:
        return
    tile = choose_tile("grouped_mm_wgrad", n, k, ceil_div(len(dy), num_groups), main_grad.device, num_groups)
    launch_wgrad(dy, x, main_grad, group_offsets.contiguous(), tile)


def _padded(operand: Tensor) -> Tensor:
    """BF16 [R, K] or [E, N, K] as PyTorch's grouped GEMM takes it; else a copy, sizes filled to multiples of 8."""
    step = ALIGNMENT // operand.element_size()
    rows, columns = operand.shape[-2:]
    if operand.dim() == 3 and operand.stride(-2) == 1:
        rows, columns = columns, rows
        lies = operand.mT
    else:
        lies = operand
    strides, sizes = lies.stride()[:-1], (columns, rows if operand.dim() == 3 else 0)
    on_rows = all(stride % step == 0 for stride in strides) and strides[-1] >= columns
    if lies.stride(-1) == 1 and on_rows and operand.data_ptr() % ALIGNMENT == 0 and all(s % step == 0 for s in sizes):
        return operand
    fill = [-operand.shape[-1] % step, -operand.shape[-2] % step if operand.dim() == 3 else 0]
    return torch.nn.functional.pad(operand, (0, fill[0], 0, fill[1])).contiguous()
