"""The sum of squares in Triton: partial sums in FP64 by at most PROGRAMS programs, then one program that adds them.

Program p takes runs p, p + P, p + 2P and so on, and sums are trees of a fixed shape: the result depends on the values
and their number alone. Atomics were refused, their order is the device's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.fp8 import ceil_div
from fp8moe.kernels.triton.launch import launch

PROGRAMS = 1024  # so many partial sums: 8 KB
RUN = 4096  # values that a program adds at a time
NUM_WARPS = 8


@triton.jit(do_not_specialize=["n"])
def partial_kernel(flat, partial, n, RUN: tl.constexpr):
    """flat [n] FP32 -> partial [P] FP64."""
    first, programs, whole = tl.program_id(0).to(tl.int64), tl.num_programs(0), (n // RUN).to(tl.int64)
    total = tl.zeros((RUN,), tl.float64)
    for run in range(first, whole, programs):
        value = tl.load(flat + run * RUN + tl.arange(0, RUN)).to(tl.float64)
        total += value * value
    if whole % programs == first:  # the short run behind the last whole one
        where = whole * RUN + tl.arange(0, RUN)
        value = tl.load(flat + where, mask=where < n, other=0.0).to(tl.float64)
        total += value * value
    tl.store(partial + first, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["programs"])
def total_kernel(partial, total, programs, PROGRAMS: tl.constexpr):
    """partial [P] -> their sum."""
    p = tl.arange(0, PROGRAMS)
    tl.store(total, tl.sum(tl.load(partial + p, mask=p < programs, other=0.0), axis=0))


def squared_norm(flat: Tensor) -> Tensor:
    n = flat.numel()
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    if n:
        programs = min(PROGRAMS, ceil_div(n, RUN))
        partial = torch.empty(programs, dtype=torch.float64, device=flat.device)
        launch(partial_kernel, (programs,), flat, partial, n, RUN=RUN, num_warps=NUM_WARPS)
        launch(total_kernel, (1,), partial, total, programs, PROGRAMS=PROGRAMS, num_warps=NUM_WARPS)
    return total
