"""The sum of squares in FP64, chunk by chunk: torch copies a chunk to FP64, never the whole buffer."""

import torch
from torch import Tensor

_CHUNK = 1 << 24  # 128 MB as FP64


def squared_norm(flat: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    for chunk in flat.split(_CHUNK):
        total += torch.linalg.vector_norm(chunk, dtype=torch.float64).square()
    return total
