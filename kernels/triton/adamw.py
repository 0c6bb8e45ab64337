"""AdamW in Triton: parts of a flat buffer, and 128x128 blocks whose FP8 codes are written beside.

The formula is the specification's in correctly rounded FP32, with a fused multiply-add where that has one (`lerp`,
`addcmul`) and nowhere else: `enable_fp_fusion` is off, so the compiler forms none of its own. Moments are bit-equal to
the specification's on a CPU with FMA; a master is within two units in the last place of its update, because the
square root of PyTorch's CPU is not correctly rounded.

A program of `blocks_step_kernel` updates its block in strips, which keeps 16 values a thread in registers, and then
casts the BF16 weight that it wrote, read again. The order is by a barrier of the program: PTX has what a thread wrote
before `bar.sync` visible to every thread of the CTA behind it, global memory included, and loads are never of the
read-only path. Casting from registers was refused: a block's scale is known only when all of it is updated (128 values
a thread), and codes stored both as they are and transposed from one cast came out wrong (see `quantize`). What is read
again lies in L2, so memory moves 24 bytes a parameter.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR, TILE, Fp8Tensor, ceil_div
from fp8moe.kernels.segments import PART, Segments
from fp8moe.kernels.triton import encode
from fp8moe.kernels.triton.launch import launch
from fp8moe.kernels.triton.quantize import write_blocks

NUM_WARPS = 8
STRIP = 16  # rows of a block that are updated at a time
WIDE, NARROW = 2048, 512  # values of a part that are updated at a time, where all of it is and where only some are


@triton.jit
def multiply_add(a, b, c):
    """a * b + c of FP32, rounded once."""
    if encode.INTERPRETED:  # its fma rounds the product as well
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def update(
    master, grad, exp_avg, exp_avg_sq, weight, where, mask, grad_scale, kept, rate1, beta2, rate2, root, eps,
    step_size, FROM_GRAD: tl.constexpr,
):  # fmt: skip
    """One step of the values at `where`. rate1, rate2: 1 - beta. kept: 1 - lr x decay. FROM_GRAD: rate1 >= 1/2."""
    g = tl.load(grad + where, mask=mask)
    w = tl.load(master + where, mask=mask)
    if grad_scale is not None:
        g = g * tl.load(grad_scale)
    m = tl.load(exp_avg + where, mask=mask).to(tl.float32)
    v = tl.load(exp_avg_sq + where, mask=mask).to(tl.float32)
    if FROM_GRAD:
        m = multiply_add(tl.full(g.shape, 1.0, tl.float32) * (rate1 - 1.0), g - m, g)
    else:
        m = multiply_add(tl.full(g.shape, 1.0, tl.float32) * rate1, g - m, m)
    v = multiply_add(rate2 * g, g, beta2 * v)
    tl.store(exp_avg + where, encode.to_output(m, exp_avg.dtype.element_ty), mask=mask)
    tl.store(exp_avg_sq + where, encode.to_output(v, exp_avg_sq.dtype.element_ty), mask=mask)
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.full(v.shape, 1.0, tl.float32) * root) + eps
    w = w * kept + tl.div_rn(step_size * m, denominator)
    tl.store(master + where, w, mask=mask)
    if weight is not None:
        tl.store(weight + where, encode.to_output(w, weight.dtype.element_ty), mask=mask)


@triton.jit
def flat_step_kernel(
    master, grad, exp_avg, exp_avg_sq, weight, parts, grad_scale, kept, rate1, beta2, rate2, root, eps, step_size,
    FROM_GRAD: tl.constexpr, PART: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """One part: values [start, stop) within one aligned run of PART.

    A lane has four values in a row, whatever their type: else Triton gives it eight for BF16's sake, FP32 loads use
    half of each sector and stores go through shared memory.
    """
    part = parts + tl.program_id(0).to(tl.int64) * 3
    start, stop, decays = tl.load(part), tl.load(part + 1), tl.load(part + 2)
    kept = tl.where(decays != 0, kept, 1.0)
    run = start // PART * PART
    if stop - start == PART:  # without masks: their ends at any value would split the loads
        for first in range(0, PART, WIDE):
            where = tl.max_contiguous(run + first + tl.arange(0, WIDE), 4)
            update(
                master, grad, exp_avg, exp_avg_sq, weight, where, None, grad_scale, kept, rate1, beta2, rate2, root,
                eps, step_size, FROM_GRAD,
            )  # fmt: skip
    else:
        for first in range(0, PART, NARROW):
            where = run + first + tl.arange(0, NARROW)
            update(
                master, grad, exp_avg, exp_avg_sq, weight, where, (where >= start) & (where < stop), grad_scale, kept,
                rate1, beta2, rate2, root, eps, step_size, FROM_GRAD,
            )  # fmt: skip


@triton.jit
def blocks_step_kernel(
    master, grad, exp_avg, exp_avg_sq, weight, codes, scales, transposed, transposed_scales, grad_scale, N, K, kept,
    rate1, beta2, rate2, root, eps, step_size, floor, FROM_GRAD: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    STRIP: tl.constexpr,
):  # fmt: skip
    """One 128x128 block of a weight [E, N, K]: updated, then its BF16 values cast in both orientations."""
    k = tl.program_id(1) * encode.TILE + tl.arange(0, encode.TILE)
    base = tl.program_id(2).to(tl.int64) * N * K
    for strip in range(0, encode.TILE, STRIP):
        n = tl.program_id(0) * encode.TILE + strip + tl.arange(0, STRIP)
        where = tl.max_contiguous(base + n.to(tl.int64)[:, None] * K + k[None, :], [1, 4])
        mask = (n < N)[:, None] & (k < K)[None, :]
        update(
            master, grad, exp_avg, exp_avg_sq, weight, where, mask, grad_scale, kept, rate1, beta2, rate2, root, eps,
            step_size, FROM_GRAD,
        )  # fmt: skip
    tl.debug_barrier()  # every warp's weights are written before any warp reads one
    write_blocks(weight, codes, scales, transposed, transposed_scales, N, K, N.to(tl.int64) * K, K, floor, POWER_OF_TWO)


def adamw_step(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    segments: Segments,
    weight: Tensor | None = None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: Tensor | None = None,
) -> None:
    if len(segments.parts):
        launch(
            flat_step_kernel, (len(segments.parts),),
            master, grad, exp_avg, exp_avg_sq, weight, segments.parts, grad_scale,
            *_constants(lr, beta1, beta2, eps, weight_decay, step), FROM_GRAD=1 - beta1 >= 0.5, PART=PART,
            WIDE=WIDE, NARROW=NARROW, num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def adamw_step_quantize(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor,
    blocks: Fp8Tensor,
    transposed: Fp8Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: Tensor | None = None,
    power_of_two: bool = False,
) -> None:
    n, k = master.shape[-2:]
    if master.numel():
        launch(
            blocks_step_kernel, (ceil_div(n, TILE), ceil_div(k, TILE), master.numel() // (n * k)),
            master, grad, exp_avg, exp_avg_sq, weight, blocks.data, blocks.scale, transposed.data, transposed.scale,
            grad_scale, n, k, *_constants(lr, beta1, beta2, eps, weight_decay, step), ACTIVATION_AMAX_FLOOR,
            FROM_GRAD=1 - beta1 >= 0.5, POWER_OF_TWO=power_of_two, STRIP=STRIP, num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip


def _constants(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int) -> tuple[float, ...]:
    """kept, rate1, beta2, rate2, root, eps, step_size of `update`."""
    root, step_size = math.sqrt(1 - beta2**step), -lr / (1 - beta1**step)
    return 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, root, eps, step_size
