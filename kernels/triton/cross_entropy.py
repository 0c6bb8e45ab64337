"""Cross entropy in Triton: one program a row, two passes over it, the second of which finds it in L2.

The first pass keeps a maximum and a sum of exponentials a column of the block, not one of the row: nothing crosses
lanes until the row ends, and a block costs one exponential a value, that of minus the distance between value and
maximum, which scales down whichever of the two is smaller. The second recomputes exp(x - maximum) and stores gradients.

Exponentials are `ex2.approx`, with at most 2 units in the last place of error; the logarithm is libdevice's, within 1.
Rows that predict nothing are only written. Blocks end at V, which need not be a power of two.
"""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.fp8 import next_power_of_2
from fp8moe.kernels.triton import encode
from fp8moe.kernels.triton.gemm import TL_DTYPE
from fp8moe.kernels.triton.launch import launch

COLUMNS = 4096  # of a row, at once
NUM_WARPS = 8
SMALLEST_BLOCK = 32 * NUM_WARPS
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of FP32; minus infinity less itself would be a NaN


@triton.jit
def fold_row(logits, V, BLOCK: tl.constexpr):
    """-> (maximum, sum of exp(x - maximum)) of a row of V logits, FP32. A NaN makes the sum NaN."""
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(logits + v, mask=v < V, other=float("-inf")).to(tl.float32)
        above = (x - top) * LOG2_E
        factor = tl.exp2(-tl.abs(above))
        total = tl.where(above > 0, total * factor + 1.0, total + factor)
        top = tl.maximum(top, x)
    highest = tl.max(top, axis=0)
    return highest, tl.sum(total * tl.exp2((top - highest) * LOG2_E), axis=0)


@triton.jit
def cross_entropy_kernel(
    logits, labels, losses, weight, V, label_stride, loss_stride, weight_stride,
    GRADIENT: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """losses [C] of logits [C, V]; GRADIENT: logits become weight * (softmax - one-hot of the label).

    weight_stride: 0 for one weight of all rows.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row * label_stride)
    losses += row * loss_stride
    logits += row * V
    if (label >= 0) & (label < V):
        predicted = tl.load(logits + label).to(tl.float32)
        highest, total = fold_row(logits, V, BLOCK)
        tl.store(losses, highest - predicted + tl.log(total))
        if GRADIENT:
            w = tl.load(weight + row * weight_stride)
            share = tl.div_rn(w, total)
            for start in range(0, V, BLOCK):
                v = start + tl.arange(0, BLOCK)
                x = tl.load(logits + v, mask=v < V, other=float("-inf")).to(tl.float32)
                d = tl.exp2((x - highest) * LOG2_E) * share
                tl.store(logits + v, encode.to_output(tl.where(v == label, d - w, d), DTYPE), mask=v < V)
    else:
        tl.store(losses, 0.0)
        if GRADIENT:
            for start in range(0, V, BLOCK):
                v = start + tl.arange(0, BLOCK)
                tl.store(logits + v, tl.zeros((BLOCK,), DTYPE), mask=v < V)


def cross_entropy(logits: Tensor, labels: Tensor, losses: Tensor) -> None:
    _launch(logits, labels, None, losses)


def cross_entropy_with_gradient(logits: Tensor, labels: Tensor, weight: Tensor, losses: Tensor) -> None:
    _launch(logits, labels, weight, losses)


def _launch(logits: Tensor, labels: Tensor, weight: Tensor | None, losses: Tensor) -> None:
    rows, size = logits.shape
    if rows == 0:
        return
    block = min(max(next_power_of_2(size), SMALLEST_BLOCK), COLUMNS)
    weight_stride = 0 if weight is None or weight.dim() == 0 else weight.stride(0)
    launch(
        cross_entropy_kernel, (rows,),
        logits, labels, losses, weight, size, labels.stride(0), losses.stride(0), weight_stride,
        GRADIENT=weight is not None, DTYPE=TL_DTYPE[logits.dtype], BLOCK=block, num_warps=NUM_WARPS,
    )  # fmt: skip
