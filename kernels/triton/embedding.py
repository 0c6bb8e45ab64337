"""The embedding's weight gradient in Triton: tokens sorted by id, one program a run of equal ids and a part of its row.

A stable sort keeps the tokens of an id in order, so a run is summed as the specification sums it, bit for bit, starting
from what `main_grad` holds. Every sorted place has its program, and those inside a run end at once: how many runs there
are is only known on the device. Rows are loaded several at a time before they are added one by one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.fp8 import ceil_div, next_power_of_2
from fp8moe.kernels.triton.launch import launch
from fp8moe.kernels.triton.quantize import last_dim_contiguous

COLUMNS = 1024  # of a row, a program
ROWS = 8  # in flight
NUM_WARPS = 4


@triton.jit
def sum_runs_kernel(
    dy, ids, order, ends, main_grad, D, dy_stride, main_grad_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """main_grad [V, D] at each id += dy [T, D] at order[i] of its run; ids sorted, ends: where the run of each ends."""
    num_d = tl.cdiv(D, BLOCK)
    first = tl.program_id(0) // num_d
    d = tl.program_id(0) % num_d * BLOCK + tl.arange(0, BLOCK)
    id = tl.load(ids + first)
    before = tl.load(ids + first - 1, mask=first > 0, other=-1)
    if id != before:
        end = tl.load(ends + first)
        where = main_grad + id * main_grad_stride + d
        total = tl.load(where, mask=d < D, other=0.0)
        for start in range(first, end, ROWS):
            for i in tl.static_range(ROWS):
                inside = start + i < end
                token = tl.load(order + start + i, mask=inside, other=0)
                total += tl.load(dy + token * dy_stride + d, mask=(d < D) & inside, other=0.0).to(tl.float32)
        tl.store(where, total, mask=d < D)


def embedding_wgrad(dy: Tensor, ids: Tensor, main_grad: Tensor) -> None:
    tokens, dim = dy.shape
    if tokens == 0 or dim == 0:
        return
    dy = last_dim_contiguous(dy)
    in_order, order = torch.sort(ids, stable=True)
    ends = torch.searchsorted(in_order, in_order, right=True, out_int32=True)
    block = min(next_power_of_2(dim), COLUMNS)
    launch(
        sum_runs_kernel, (tokens * ceil_div(dim, block),),
        dy, in_order, order, ends, main_grad, dim, dy.stride(0), main_grad.stride(0),
        ROWS=ROWS, BLOCK=block, num_warps=NUM_WARPS,
    )  # fmt: skip
