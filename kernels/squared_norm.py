"""The sum of squares of a flat FP32 buffer, in FP64: what the norm of all gradients is made of.

Numerics: an FP32 square is exact in FP64, and so the sum is right to the last digits that clipping could ever need. The
order of the sum depends on the size alone, so that every rank and every repetition decides alike.
`torch.linalg.vector_norm(dtype=torch.float64)` of a whole buffer was refused: it copies the buffer to FP64 first, twice
the gradients' memory.
"""

import torch
from torch import Tensor

from fp8moe.kernels import backend


def squared_norm(flat: Tensor) -> Tensor:
    """flat [n] FP32, contiguous -> its squares' sum, FP64 [] on the same device; 0 for n = 0. Nothing waits for it.

    Raises ValueError for another dtype, shape or layout.
    """
    if flat.dtype is not torch.float32 or flat.dim() != 1 or not flat.is_contiguous():
        raise ValueError(
            f"squared_norm takes a contiguous FP32 [n], got {flat.dtype} {list(flat.shape)} with strides "
            f"{list(flat.stride())}: flatten it"
        )
    total: Tensor = backend.op("squared_norm")(flat)
    return total
