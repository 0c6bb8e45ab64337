"""One distance between a computed matrix and the exact one, for every test and every format."""

import torch
from torch import Tensor


def calc_diff(out: Tensor, exact: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> float:
    """1 - 2 <x, y> / (|x|^2 + |y|^2) in FP64: half the squared relative distance, 0.0 for two zero tensors.

    For out = a @ b^T pass the operands: every element is then divided by the norms of its two rows, without which a few
    large rows hide all the others.
    """
    x, y = out.double(), exact.double()
    if a is not None and b is not None:
        norms = a.double().norm(dim=-1)[..., :, None] * b.double().norm(dim=-1)[..., None, :]
        x, y = (torch.where(norms > 0, value / norms, value) for value in (x, y))
    energy = float((x * x + y * y).sum())
    # The difference itself, not 1 - ratio: that would lose everything below 1e-16 x the energy.
    return float(((x - y) ** 2).sum()) / energy if energy else 0.0
