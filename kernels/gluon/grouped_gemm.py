"""Grouped FP8 GEMMs on Hopper: `rows_kernel`, and for the weight gradient `columns_kernel`, with offsets."""

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.gluon.launch import choose_tile, launch_columns, launch_rows, num_sms, typical_rows
from fp8moe.kernels.gluon.ready import ready_columns, ready_rows


def grouped_gemm(
    a: Fp8Tensor, b: Fp8Tensor, group_offsets: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    launch_on = ready_rows("grouped_gemm", a, b, out_dtype, None)
    if launch_on is not None:
        out = torch.empty(a.data.shape[0], b.data.shape[1], dtype=out_dtype, device=a.data.device)
        launch_on(a.data, b.data, a.scale, b.scale, out, group_offsets)
        return out
    (r, k), (num_groups, n) = a.shape, b.shape[:2]
    if min(r, n, k, num_groups) == 0:
        return torch.zeros(r, n, dtype=out_dtype, device=a.device)
    tile = choose_tile("grouped_gemm", typical_rows(r, num_groups), n, k, a.device, num_groups)
    out = torch.empty(r, n, dtype=out_dtype, device=a.device)
    launch_rows(a, b, out, tile=tile, sms=num_sms(a.device), group_offsets=group_offsets)
    return out


def grouped_wgrad(dy_columns: Fp8Tensor, x_columns: Fp8Tensor, group_offsets: Tensor, main_grad: Tensor) -> None:
    launch_on = ready_columns("grouped_wgrad", dy_columns, x_columns, main_grad)
    if launch_on is not None:
        launch_on(dy_columns.data, x_columns.data, dy_columns.scale, x_columns.scale, main_grad, group_offsets)
        return
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
