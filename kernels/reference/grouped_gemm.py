"""Grouped FP8 GEMM: one weight for each contiguous group of rows; each group is the plain GEMM of the specification."""

import itertools

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.reference._product import write_product


def grouped_gemm(
    a: Fp8Tensor, b: Fp8Tensor, group_offsets: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    out = torch.empty(a.shape[0], b.shape[1], dtype=out_dtype, device=a.device)
    offsets = group_offsets.tolist()
    for e, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if start < stop:
            rows = Fp8Tensor(a.data[start:stop], a.scale[start:stop])
            write_product(out[start:stop], rows, Fp8Tensor(b.data[e], b.scale[e], b.tile))
    out[offsets[-1] :] = 0
    return out
