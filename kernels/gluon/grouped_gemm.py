"""Grouped FP8 GEMM on Hopper: `rows_kernel` with the experts' offsets, read on the device."""

import torch
from torch import Tensor

from fp8moe.kernels import tiles
from fp8moe.kernels.fp8 import Fp8Tensor, ceil_div
from fp8moe.kernels.gluon.launch import device_name, launch_rows, num_sms


def grouped_gemm(
    a: Fp8Tensor, b: Fp8Tensor, group_offsets: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    (r, k), (num_groups, n) = a.shape, b.shape[:2]
    if min(r, n, k, num_groups) == 0:
        return torch.zeros(r, n, dtype=out_dtype, device=a.device)
    mean_rows = ceil_div(r, num_groups)  # the host does not know the groups
    tile = tiles.choose("gluon", "grouped_gemm", mean_rows, n, k, groups=num_groups, device=device_name(a.device))
    out = torch.empty(r, n, dtype=out_dtype, device=a.device)
    launch_rows(a, b, out, tile=tile, sms=num_sms(a.device), group_offsets=group_offsets)
    return out
