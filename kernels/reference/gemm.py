"""FP8 GEMM, and the weight gradient of unquantized operands. Sums and promotion: `_product`."""

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.reference._arithmetic import ExactBf16Products, add_product, write_product

# Of a partial sum: FP32 copies of its operands stay in a core's cache, and in memory that was used before.
_TOKENS, _OUTPUTS = 1024, 4096


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
    for tokens, values in zip(dy.split(_TOKENS), x.split(_TOKENS), strict=True):
        values = values.float()
        for part, target in zip(tokens.split(_OUTPUTS, dim=1), main_grad.split(_OUTPUTS), strict=True):
            target.addmm_(part.float().t(), values)
