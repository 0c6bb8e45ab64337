"""Grouped FP8 weight gradient: each expert contracts over its own tokens, both operands scaled along them.

The contraction is ragged (an expert's rows), so groups start on multiples of 128: a scale then never covers tokens of
two experts. The result goes straight into FP32 `main_grad`; a BF16 result added later was refused, it would round every
micro-batch's contribution.
"""

from torch import Tensor

from fp8moe.kernels import backend
from fp8moe.kernels.fp8 import ROW_TILE, TILE, Fp8Tensor, check_groups, check_sizes, check_total


def grouped_wgrad(dy_columns: Fp8Tensor, x_columns: Fp8Tensor, group_offsets: Tensor, main_grad: Tensor) -> None:
    """main_grad [E, N, K] (FP32) += dy^T @ x of each group, for dy_columns [N, R], x_columns [K, R].

    group_offsets: int32 [E+1], multiples of 128. An empty group adds nothing; columns past the last offset are not
    read. Raises ValueError for other tiles, shapes, dtypes or offsets.
    """
    if dy_columns.tile != ROW_TILE or x_columns.tile != ROW_TILE:
        raise ValueError(
            f"grouped_wgrad takes columns of {ROW_TILE} tiles, not {dy_columns.tile} and {x_columns.tile}: requantize"
        )
    if len(dy_columns.shape) != 2 or len(x_columns.shape) != 2 or dy_columns.shape[1] != x_columns.shape[1]:
        raise ValueError(
            f"grouped_wgrad takes columns [N, R] and [K, R] of one R, not {list(dy_columns.shape)} and "
            f"{list(x_columns.shape)}: quantize both by columns"
        )
    n, k = dy_columns.shape[0], x_columns.shape[0]
    check_sizes(N=n, K=k)
    check_total(main_grad, (main_grad.shape[0], n, k))
    check_groups(group_offsets, main_grad.shape[0], x_columns.shape[1], TILE)
    backend.op("grouped_wgrad")(dy_columns, x_columns, group_offsets, main_grad)
