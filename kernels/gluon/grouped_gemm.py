"""Grouped FP8 GEMMs on Hopper: `rows_kernel`, and for the weight gradient `columns_kernel`, with offsets."""

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.gluon.launch import choose_tile, launch_columns, launch_rows, num_sms, typical_rows


def grouped_gemm(
    a: Fp8Tensor, b: Fp8Tensor, group_offsets: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    (r, k), (num_groups, n) = a.shape, b.shape[:2]
    if min(r, n, k, num_groups) == 0:
        return torch.zeros(r, n, dtype=out_dtype, device=a.device)
    tile = choose_tile("grouped_gemm", typical_rows(r, num_groups), n, k, a.device, num_groups)
    out = torch.empty(r, n, dtype=out_dtype, device=a.device)
    launch_rows(a, b, out, tile=tile, sms=num_sms(a.device), group_offsets=group_offsets)
    return out


def grouped_wgrad(dy_columns: Fp8Tensor, x_columns: Fp8Tensor, group_offsets: Tensor, main_grad: Tensor) -> None:
    num_groups, n, k = main_grad.shape
    r = dy_columns.shape[1]
    if min(num_groups, n, k, r) == 0:
        return
    if not main_grad.is_contiguous():
        raise ValueError(
            f"grouped_wgrad adds into a contiguous main_grad, this one has strides {main_grad.stride()}: allocate it so"
        )
    tile = choose_tile("grouped_wgrad", n, k, typical_rows(r, num_groups), main_grad.device, num_groups)
    launch_columns(
        dy_columns,
        x_columns,
        main_grad,
        tile=tile,
        sms=num_sms(main_grad.device),
        group_offsets=group_offsets,
        accumulate=True,
    )
