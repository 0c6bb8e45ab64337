"""FP8 GEMM on Hopper: rows by blocks (`rows_kernel`), rows by rows (`columns_kernel`), with tiles from the table.

The unquantized weight gradient is `tokens_kernel`'s with one group; Triton's kernel where an operand is FP32.
"""

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import BLOCK_TILE, Fp8Tensor
from fp8moe.kernels.gluon.launch import choose_tile, launch_columns, launch_rows, num_sms
from fp8moe.kernels.gluon.launch_tokens import by_triton, launch_tokens
from fp8moe.kernels.gluon.ready import ready_columns, ready_rows, ready_tokens
from fp8moe.kernels.triton import gemm as triton_gemm


def gemm(
    a: Fp8Tensor, b: Fp8Tensor, *, out_dtype: torch.dtype = torch.bfloat16, accumulate: Tensor | None = None
) -> Tensor:
    if b.tile == BLOCK_TILE:
        launch_on = ready_rows("gemm", a, b, out_dtype, accumulate)
    else:
        launch_on = None if accumulate is None else ready_columns("gemm_columns", a, b, accumulate)
    if launch_on is None:
        return _step_by_step(a, b, out_dtype, accumulate)
    out = accumulate
    if out is None:
        out = torch.empty(a.data.shape[0], b.data.shape[0], dtype=out_dtype, device=a.data.device)
    launch_on(a.data, b.data, a.scale, b.scale, out, None)
    return out


def _step_by_step(a: Fp8Tensor, b: Fp8Tensor, out_dtype: torch.dtype, accumulate: Tensor | None) -> Tensor:
    """The same on operands that lie anyhow."""
    (m, k), n, device = a.data.shape, b.data.shape[0], a.data.device
    if not (m and n and k):
        return torch.zeros(m, n, dtype=out_dtype, device=device) if accumulate is None else accumulate
    out = accumulate
    if out is None or out.stride(1) != 1:
        out = torch.empty(m, n, dtype=out_dtype if accumulate is None else torch.float32, device=device)
    op, launch = ("gemm", launch_rows) if b.tile == BLOCK_TILE else ("gemm_columns", launch_columns)
    tile = choose_tile(op, m, n, k, device)
    launch(a, b, out, tile=tile, sms=num_sms(device), accumulate=out is accumulate)
    if accumulate is None or out is accumulate:
        return out
    return accumulate.add_(out)


def wgrad(dy: Tensor, x: Tensor, main_grad: Tensor) -> None:
    launch_on = ready_tokens("wgrad", dy, x, main_grad)
    if launch_on is not None:
        launch_on(dy, x, main_grad, None)
        return
    total = main_grad[None]
    if total.numel() == 0 or len(dy) == 0:
        return
    if by_triton(dy, x, total):
        triton_gemm.wgrad(dy, x, main_grad)
        return
    tile = choose_tile("wgrad", dy.shape[1], x.shape[1], dy.shape[0], main_grad.device)
    launch_tokens(dy, x, total, None, tile=tile, sms=num_sms(main_grad.device))
