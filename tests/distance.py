"""The one distance of all numerics tests: 1 - 2 sum(xy) / sum(x^2 + y^2), rows and columns put on one scale first.

Without the scaling a few outlier rows hide every error in the others: output element (i, j) of a product is divided by
|a_i| |b_j|, the norms of the rows it comes from, so that every element weighs the same.
"""

from __future__ import annotations

import torch
from torch import Tensor


def calc_diff(x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> float:
    """Distance of x and y [M, N] in FP64, about half the squared relative error; `a` [M, K] and `b` [N, K] scale it.

    NaN or infinity in either makes it infinite, so that no bound can be met.
    """
    x, y = x.double(), y.double()
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        return float("inf")
    if a is not None and b is not None:
        scale = a.double().norm(dim=1)[:, None] * b.double().norm(dim=1)
        x, y = (torch.where(scale > 0, v / scale.clamp(min=1e-300), v) for v in (x, y))
    total = (x * x + y * y).sum()
    return float(1 - 2 * (x * y).sum() / total) if total > 0 else 0.0
