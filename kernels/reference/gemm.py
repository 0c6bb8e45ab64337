"""FP8 GEMM, and the weight gradient of unquantized operands. Sums and promotion: `_product`."""

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import TILE, Fp8Tensor
from fp8moe.kernels.reference._arithmetic import ExactBf16Products, add_product, write_product

_COPIED = 1 << 22  # values of dy copied to FP32 at a time: 16 MiB, which the allocator keeps


def gemm(
    a: Fp8Tensor, b: Fp8Tensor, *, out_dtype: torch.dtype = torch.bfloat16, accumulate: Tensor | None = None
) -> Tensor:
    if accumulate is not None:
        add_product(accumulate, a, b)
        return accumulate
    out = torch.empty(a.shape[0], b.shape[0], dtype=out_dtype, device=a.device)
    write_product(out, a, b)
    return out


def wgrad(dy: Tensor, x: Tensor, main_grad: Tensor) -> None:
    if dy.dtype is torch.bfloat16 and x.dtype is torch.bfloat16:
        with ExactBf16Products():
            _add_wgrad(dy, x, main_grad)
    else:
        _add_wgrad(dy, x, main_grad)


def _add_wgrad(dy: Tensor, x: Tensor, main_grad: Tensor) -> None:
    # By rows of main_grad: each of its sums is whole, and the FP32 copy of dy (of logits: 64 MiB) reuses its memory.
    values, step = x.float(), max(1, _COPIED // max(dy.shape[0], 1) // TILE) * TILE
    for part, target in zip(dy.split(step, dim=1), main_grad.split(step), strict=True):
        target.addmm_(part.float().t(), values)
