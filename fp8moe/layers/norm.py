"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, statistics in FP32, output in the dtype of x."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp8moe.layers.precision import Precision


class RMSNorm(nn.Module):
    """x [T, D] -> [T, D]; `weight` [D], ones at first."""

    def __init__(self, dim: int, *, eps: float, precision: Precision, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=precision.dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
