"""FP8 GEMM on Hopper: rows by blocks (`rows_kernel`), rows by rows (`columns_kernel`), with tiles from the table.

The unquantized weight gradient is `tokens_kernel`'s with one group; Triton's kernel where an operand is FP32.
"""

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import BLOCK_TILE, Fp8Tensor
from fp8moe.kernels.gluon.launch import choose_tile, launch_columns, launch_rows, num_sms
from fp8moe.kernels.gluon.launch_tokens import by_triton, launch_tokens
from fp8moe.kernels.triton import gemm as triton_gemm


def gemm(
    a: Fp8Tensor, b: Fp8Tensor, *, out_dtype: torch.dtype = torch.bfloat16, accumulate: Tensor | None = None
) -> Tensor:
    (m, k), n = a.shape, b.shape[0]
    if min(m, n, k) == 0:
        return torch.zeros(m, n, dtype=out_dtype, device=a.device) if accumulate is None else accumulate
    out = accumulate
    if out is None or out.stride(1) != 1:
        out = torch.empty(m, n, dtype=out_dtype if accumulate is None else torch.float32, device=a.device)
    blocks = b.tile == BLOCK_TILE
    tile = choose_tile("gemm" if blocks else "gemm_columns", m, n, k, a.device)
    launch = launch_rows if blocks else launch_columns
    launch(a, b, out, tile=tile, sms=num_sms(a.device), accumulate=out is accumulate)
    if accumulate is None or out is accumulate:
        return out
    return accumulate.add_(out)


def wgrad(dy: Tensor, x: Tensor, main_grad: Tensor) -> None:
    total = main_grad[None]
    if total.numel() == 0 or len(dy) == 0:
        return
    if by_triton(dy, x, total):
        triton_gemm.wgrad(dy, x, main_grad)
        return
    tile = choose_tile("wgrad", dy.shape[1], x.shape[1], dy.shape[0], main_grad.device)
    launch_tokens(dy, x, total, None, tile=tile, sms=num_sms(main_grad.device))
