"""FP8 GEMM, and the weight gradient of unquantized operands. Sums and promotion: `_product`."""

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.reference._arithmetic import ExactBf16Products, add_product, write_product


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
            main_grad.addmm_(dy.float().t(), x.float())
    else:
        main_grad.addmm_(dy.float().t(), x.float())
