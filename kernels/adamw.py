"""One AdamW step on one (shard of a) parameter: FP32 master and gradient, BF16 or FP32 moments.

Numerics: all arithmetic in FP32; the update uses the moments before they are rounded to their storage type. Decay is
decoupled (Loshchilov and Hutter, 2019) and applied before the update, as `torch.optim.AdamW` does. BF16 moments are
DeepSeek-V3's (report, section 3.3.3); torch's own optimizer was refused because it keeps the moments in the parameter's
type.

`grad_scale` multiplies the gradient on the way in (clipping), so that no pass over memory is spent on it.
"""

import torch
from torch import Tensor

from fp8moe.kernels import backend


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
    """Update master, exp_avg and exp_avg_sq in place; all four have one shape and are contiguous. grad is only read.

    step counts from 1. grad_scale: a number or an FP32 scalar tensor. Raises ValueError for other dtypes, shapes or
    layouts, or step < 1.
    """
    tensors = (master, grad, exp_avg, exp_avg_sq)
    if master.dtype is not torch.float32 or grad.dtype is not torch.float32:
        raise ValueError(f"master and gradient must be FP32, got {master.dtype} and {grad.dtype}: keep FP32 masters")
    if any(moment.dtype not in (torch.bfloat16, torch.float32) for moment in (exp_avg, exp_avg_sq)):
        raise ValueError(f"moments must be BF16 or FP32, got {exp_avg.dtype} and {exp_avg_sq.dtype}: cast them")
    if len({tensor.shape for tensor in tensors}) > 1 or not all(tensor.is_contiguous() for tensor in tensors):
        shapes = [list(tensor.shape) for tensor in tensors]
        raise ValueError(
            f"master, gradient and moments must be contiguous and of one shape, got {shapes}: flatten them"
        )
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}: use 1 for the first")
    backend.op("adamw_step")(
        *tensors,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        step=step,
        grad_scale=grad_scale,
    )
