"""FP8 GEMM by DeepGEMM's `fp8_gemm_nt`, which takes K-major codes with FP32 scales and lays the scales out itself.

It writes BF16 for rows by 128x128 blocks. FP32 results, sums into `accumulate` and the product of two 1x128 operands
run on Triton: DeepGEMM has them too, but under a signature that differs from release to release.
"""

import deep_gemm
import torch
from torch import Tensor

from fp8moe.kernels.fp8 import BLOCK_TILE, Fp8Tensor
from fp8moe.kernels.triton import gemm as portable


def gemm(
    a: Fp8Tensor, b: Fp8Tensor, *, out_dtype: torch.dtype = torch.bfloat16, accumulate: Tensor | None = None
) -> Tensor:
    (m, k), n = a.shape, b.shape[0]
    plain = b.tile == BLOCK_TILE and out_dtype is torch.bfloat16 and accumulate is None
    if not plain or min(m, n, k) == 0:
        return portable.gemm(a, b, out_dtype=out_dtype, accumulate=accumulate)
    out = torch.empty(m, n, dtype=torch.bfloat16, device=a.device)
    deep_gemm.fp8_gemm_nt((a.data.contiguous(), a.scale), (b.data.contiguous(), b.scale.contiguous()), out)
    return out
