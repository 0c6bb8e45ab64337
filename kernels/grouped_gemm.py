"""Grouped FP8 matrix products, one for each expert: `grouped_gemm`, and the weight gradient `grouped_wgrad`.

Numerics and scales are `gemm`'s. Groups start on multiples of 128 rows so that a 128-row tile never straddles two
experts; a masked layout with one fixed capacity an expert was refused: no token is dropped here, and the fullest expert
would set the cost of all. The weight gradient contracts over each expert's own tokens, both operands scaled along them,
straight into FP32 `main_grad`: a BF16 result added later was refused, it would round every micro-batch's contribution.
"""

import torch
from torch import Tensor

from fp8moe.kernels import backend
from fp8moe.kernels.fp8 import BLOCK_TILE, ROW_TILE, TILE, Fp8Tensor, check_groups, check_sizes, check_total


def grouped_gemm(
    a: Fp8Tensor, b: Fp8Tensor, group_offsets: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """a rows [R, K], b blocks [E, N, K], group_offsets int32 [E+1] -> [R, N]: a[rows of e] @ b[e]^T.

    Rows past group_offsets[-1] are zero in the result, whatever they hold in `a`. Groups may be empty.
    Raises ValueError for other tiles, shapes or dtypes, and for offsets that are not multiples of 128.
    """
    if a.tile != ROW_TILE or b.tile != BLOCK_TILE:
        raise ValueError(
            f"grouped_gemm takes a by {ROW_TILE} and b by {BLOCK_TILE} tiles, not {a.tile} and {b.tile}: requantize"
        )
    a_shape, b_shape = a.data.shape, b.data.shape
    if len(a_shape) != 2 or len(b_shape) != 3 or a_shape[1] != b_shape[2]:
        raise ValueError(
            f"grouped_gemm takes a [R, K] and b [E, N, K] of one K, not {list(a_shape)} and "
            f"{list(b_shape)}: transpose b"
        )
    check_sizes(K=a_shape[1], N=b_shape[1])
    if out_dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"grouped_gemm writes torch.bfloat16 or torch.float32, not {out_dtype}: cast afterwards")
    check_groups(group_offsets, b_shape[0], a_shape[0], TILE)
    return backend.op("grouped_gemm")(a, b, group_offsets, out_dtype=out_dtype)


def grouped_wgrad(dy_columns: Fp8Tensor, x_columns: Fp8Tensor, group_offsets: Tensor, main_grad: Tensor) -> None:
    """main_grad [E, N, K] (FP32) += dy^T @ x of each group, for dy_columns [N, R], x_columns [K, R].

    group_offsets: int32 [E+1], multiples of 128. An empty group adds nothing; columns past the last offset are not
    read. Raises ValueError for other tiles, shapes, dtypes or offsets.
    """
    if dy_columns.tile != ROW_TILE or x_columns.tile != ROW_TILE:
        raise ValueError(
            f"grouped_wgrad takes columns of {ROW_TILE} tiles, not {dy_columns.tile} and {x_columns.tile}: requantize"
        )
    dy_shape, x_shape = dy_columns.data.shape, x_columns.data.shape
    if len(dy_shape) != 2 or len(x_shape) != 2 or dy_shape[1] != x_shape[1]:
        raise ValueError(
            f"grouped_wgrad takes columns [N, R] and [K, R] of one R, not {list(dy_shape)} and "
            f"{list(x_shape)}: quantize both by columns"
        )
    (n, r), k, num_groups = dy_shape, x_shape[0], main_grad.shape[0]
    check_sizes(N=n, K=k)
    check_total(main_grad, (num_groups, n, k))
    check_groups(group_offsets, num_groups, r, TILE)
    backend.op("grouped_wgrad")(dy_columns, x_columns, group_offsets, main_grad)
