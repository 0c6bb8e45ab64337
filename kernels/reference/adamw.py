"""AdamW with decoupled weight decay, all arithmetic in FP32; in chunks, so that temporaries stay in the cache."""

import math

from torch import Tensor

_CHUNK = 1 << 16


def adamw_step(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float | Tensor = 1.0,
) -> None:
    step_size = lr / (1 - beta1**step)
    root_correction = math.sqrt(1 - beta2**step)
    flat = [tensor.view(-1) for tensor in (master, grad, exp_avg, exp_avg_sq)]
    for w, g, m16, v16 in zip(*(tensor.split(_CHUNK) for tensor in flat), strict=True):
        g = g * grad_scale
        m = m16.float().lerp(g, 1 - beta1)
        v = v16.float().mul(beta2).addcmul_(g, g, value=1 - beta2)
        m16.copy_(m)
        v16.copy_(v)
        w.mul_(1 - lr * weight_decay).addcdiv_(m, v.sqrt_().div_(root_correction).add_(eps), value=-step_size)
