"""AdamW with decoupled weight decay, all arithmetic in FP32; in chunks, so that temporaries stay in the cache."""

import math

from torch import Tensor

from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR, Fp8Tensor
from fp8moe.kernels.reference._arithmetic import write_blocks
from fp8moe.kernels.segments import Segments

_CHUNK = 1 << 16


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
    step_size = lr / (1 - beta1**step)
    root_correction = math.sqrt(1 - beta2**step)
    for start, stop, decays in segments.spans:
        kept = 1 - lr * (weight_decay if decays else 0.0)
        for first in range(start, stop, _CHUNK):
            chunk = slice(first, min(first + _CHUNK, stop))
            m16, v16, w = exp_avg[chunk], exp_avg_sq[chunk], master[chunk]
            g = grad[chunk] if grad_scale is None else grad[chunk] * grad_scale
            m = m16.float().lerp(g, 1 - beta1)
            v = v16.float().mul(beta2).addcmul_(g, g, value=1 - beta2)
            m16.copy_(m)
            v16.copy_(v)
            w.mul_(kept).addcdiv_(m, v.sqrt_().div_(root_correction).add_(eps), value=-step_size)
            if weight is not None:
                weight[chunk].copy_(w)


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
    adamw_step(
        master.view(-1),
        grad.view(-1),
        exp_avg.view(-1),
        exp_avg_sq.view(-1),
        Segments(((0, master.numel(), True),), master.new_empty(0, 3)),  # parts are for launches
        weight.view(-1),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        step=step,
        grad_scale=grad_scale,
    )
    write_blocks(weight, blocks, transposed, ACTIVATION_AMAX_FLOOR, power_of_two)
