"""Grouped FP8 GEMM by DeepGEMM's contiguous layout: a group index for every row, -1 for rows of nobody.

The indices are made on the device from the offsets. Rows of nobody are skipped, so the result starts as zeros. FP32
results run on Triton.
"""

import deep_gemm
import torch
from torch import Tensor

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.triton import grouped_gemm as portable


def grouped_gemm(
    a: Fp8Tensor, b: Fp8Tensor, group_offsets: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    (r, k), (num_groups, n, _) = a.shape, b.shape
    if out_dtype is not torch.bfloat16 or min(r, k, num_groups, n) == 0:
        return portable.grouped_gemm(a, b, group_offsets, out_dtype=out_dtype)
    out = torch.zeros(r, n, dtype=torch.bfloat16, device=a.device)
    operands = (a.data.contiguous(), a.scale), (b.data.contiguous(), b.scale.contiguous())
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(*operands, out, group_of_rows(group_offsets, r))
    return out


def group_of_rows(group_offsets: Tensor, num_rows: int) -> Tensor:
    """int32 [num_rows]: the group of each row, -1 past the last one; group_offsets int32 [E+1] on the same device."""
    rows = torch.arange(num_rows, dtype=torch.int32, device=group_offsets.device)
    group = torch.searchsorted(group_offsets[1:].contiguous(), rows, right=True, out_int32=True)
    return torch.where(group < group_offsets.shape[0] - 1, group, -1).to(torch.int32)
