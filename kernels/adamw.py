"""AdamW on flat buffers, and on weights whose FP8 blocks are written in the same pass.

Numerics: all arithmetic in FP32; the update uses the moments before they are rounded to their storage type. Decay is
decoupled (Loshchilov and Hutter, 2019) and applied before the update, as `torch.optim.AdamW` does. BF16 moments are
DeepSeek-V3's (report, section 3.3.3); torch's own optimizer was refused because it keeps the moments in the parameter's
type.

Layout: master, gradient and moments of many parameters lie end to end, and `Segments` says which values are updated and
which decay; any range of a flat buffer is a flat buffer. With BF16 moments `adamw_step` moves 22 bytes a parameter: it
reads gradient 4, master 4, moments 2 + 2, writes master 4, moments 2 + 2, weight 2. `adamw_step_quantize` writes the
codes in both orientations as well: 24 bytes, and 8 for the two scales of a block of 16,384. Casting the weights in a
launch of its own would read them once more from memory.

`grad_scale` multiplies the gradient on the way in (clipping), so that no pass over memory is spent on it. It is a
tensor: a device may have computed it, and nothing waits.
"""

import torch
from torch import Tensor

from fp8moe.kernels import backend
from fp8moe.kernels.fp8 import BLOCK_TILE, Fp8Tensor, check_sizes
from fp8moe.kernels.segments import Segments


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
    """Update the values of `segments` of master, exp_avg and exp_avg_sq in place, and round master into weight.

    All are contiguous [n]: master and grad FP32, moments BF16 or FP32, weight BF16 where there is one; grad is only
    read. weight_decay is of the segments that decay, the others have none. step counts from 1. grad_scale: FP32 [] on
    the same device, None for one. Raises ValueError for other dtypes, shapes or layouts, segments beyond n, or
    step < 1.
    """
    _check_state(master, grad, exp_avg, exp_avg_sq, weight, step, grad_scale)
    if master.dim() != 1 or segments.end > master.numel():
        raise ValueError(
            f"segments that end at {segments.end} need flat buffers of as many values, master is {list(master.shape)}: "
            "flatten it, or take the segments within it"
        )
    backend.op("adamw_step")(
        master,
        grad,
        exp_avg,
        exp_avg_sq,
        segments,
        weight,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        step=step,
        grad_scale=grad_scale,
    )


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
    """`adamw_step` of one weight [..., N, K], all of which decays, and `quantize_blocks` of what it wrote.

    blocks [..., N, K] and transposed [..., K, N], codes and scales contiguous, are overwritten: bit for bit what
    `quantize_blocks` makes of the new weight, its scales powers of two where asked. Raises ValueError as `adamw_step`
    and `quantize_blocks` do.
    """
    _check_state(master, grad, exp_avg, exp_avg_sq, weight, step, grad_scale)
    if master.dim() < 2:
        raise ValueError(f"blocks are of weights [..., N, K], master is {list(master.shape)}: use adamw_step")
    *leading, n, k = master.shape
    check_sizes(N=n, K=k)
    for name, q, shape in (("blocks", blocks, (*leading, n, k)), ("transposed", transposed, (*leading, k, n))):
        if q.tile != BLOCK_TILE or q.shape != shape or not (q.data.is_contiguous() and q.scale.is_contiguous()):
            raise ValueError(
                f"{name} of a weight {list(master.shape)} must be contiguous {list(shape)} of {BLOCK_TILE} tiles, got "
                f"{list(q.shape)} of {q.tile}: make them by quantize_blocks"
            )
    backend.op("adamw_step_quantize")(
        master,
        grad,
        exp_avg,
        exp_avg_sq,
        weight,
        blocks,
        transposed,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        step=step,
        grad_scale=grad_scale,
        power_of_two=power_of_two,
    )


def _check_state(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor | None,
    step: int,
    grad_scale: Tensor | None,
) -> None:
    if master.dtype is not torch.float32 or grad.dtype is not torch.float32:
        raise ValueError(f"master and gradient must be FP32, got {master.dtype} and {grad.dtype}: keep FP32 masters")
    if any(moment.dtype not in (torch.bfloat16, torch.float32) for moment in (exp_avg, exp_avg_sq)):
        raise ValueError(f"moments must be BF16 or FP32, got {exp_avg.dtype} and {exp_avg_sq.dtype}: cast them")
    if exp_avg.dtype is not exp_avg_sq.dtype:
        raise ValueError(f"moments must have one dtype, got {exp_avg.dtype} and {exp_avg_sq.dtype}: cast one")
    if weight is not None and weight.dtype is not torch.bfloat16:
        raise ValueError(f"weight must be BF16, got {weight.dtype}: an FP32 weight is its own master, use weight=None")
    tensors = [master, grad, exp_avg, exp_avg_sq, *([] if weight is None else [weight])]
    if len({tensor.shape for tensor in tensors}) > 1 or not all(tensor.is_contiguous() for tensor in tensors):
        shapes = [list(tensor.shape) for tensor in tensors]
        raise ValueError(
            f"master, gradient, moments and weight must be contiguous and of one shape, got {shapes}: flatten them"
        )
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}: use 1 for the first")
    if grad_scale is not None and (grad_scale.dtype is not torch.float32 or grad_scale.shape != ()):
        raise ValueError(
            f"grad_scale must be FP32 [], got {grad_scale.dtype} {list(grad_scale.shape)}: use torch.full((), scale)"
        )
