"""The clamped activation of GPT-OSS and its derivative in FP32, for the specifications with casts and without."""

import torch
from torch import Tensor

ALPHA = 1.702  # of the sigmoid


def activate_clamped(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """g * sigmoid(1.702 g) * (u + 1) for gate, up [m, F] FP32."""
    gate = gate.clamp(max=limit)
    return torch.sigmoid(ALPHA * gate).mul_(gate).mul_(up.clamp(-limit, limit).add_(1))


def differentiate_clamped(gate: Tensor, up: Tensor, dy: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """(d gate, d up [m, F], d weight [m]) of `activate_clamped` for dy [m, F] and a weight of one."""
    stopped_gate, stopped_up = gate > limit, up.abs() > limit
    gate, factor = gate.clamp(max=limit), up.clamp(-limit, limit).add_(1)
    sigma = torch.sigmoid(ALPHA * gate)
    upstream = dy * sigma
    d_up = upstream * gate
    d_gate = upstream.mul_(factor).mul_((1 - sigma).mul_(ALPHA * gate).add_(1))
    return d_gate.masked_fill_(stopped_gate, 0), d_up.masked_fill(stopped_up, 0), (d_up * factor).sum(dim=1)
