"""Grouped matrix products, one for each expert: FP8 (`grouped_gemm`, `grouped_wgrad`), unquantized (`grouped_mm`).

FP8: numerics and scales are `gemm`'s. Groups start on multiples of 128 rows so that a 128-row tile never straddles two
experts; a masked layout with one fixed capacity an expert was refused: no token is dropped here, and the fullest expert
would set the cost of all. The weight gradient contracts over each expert's own tokens, both operands scaled along them,
straight into FP32 `main_grad`: a BF16 result added later was refused, it would round every micro-batch's contribution.

BF16 and FP32: groups may start anywhere; nothing is scaled, so nothing must be aligned. Sums are FP32, and the weight
gradient is added into FP32 `main_grad` without a rounding between. `torch.nn.functional.grouped_mm` was refused: it
leaves rows outside every group unwritten and has no accumulating weight gradient.
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
    if len(a.shape) != 2 or len(b.shape) != 3 or a.shape[1] != b.shape[2]:
        raise ValueError(
            f"grouped_gemm takes a [R, K] and b [E, N, K] of one K, not {list(a.shape)} and "
            f"{list(b.shape)}: transpose b"
        )
    check_sizes(K=a.shape[1], N=b.shape[1])
    if out_dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"grouped_gemm writes torch.bfloat16 or torch.float32, not {out_dtype}: cast afterwards")
    check_groups(group_offsets, b.shape[0], a.shape[0], TILE)
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


def grouped_mm(x: Tensor, w: Tensor, group_offsets: Tensor) -> Tensor:
    """x [R, K], w [E, N, K] of one dtype (BF16 or FP32), group_offsets int32 [E+1] -> x[rows of e] @ w[e]^T [R, N].

    Rows past group_offsets[-1] are zero in the result. Raises ValueError for other shapes or dtypes.
    """
    if x.dtype != w.dtype or x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"grouped_mm takes BF16 or FP32, one for both, not {x.dtype} and {w.dtype}: cast one")
    if x.dim() != 2 or w.dim() != 3 or x.shape[1] != w.shape[2]:
        raise ValueError(
            f"grouped_mm takes x [R, K] and w [E, N, K] of one K, not {list(x.shape)} and {list(w.shape)}: transpose w"
        )
    check_groups(group_offsets, w.shape[0], x.shape[0], 1)
    return backend.op("grouped_mm")(x, w, group_offsets)


def grouped_mm_wgrad(dy: Tensor, x: Tensor, group_offsets: Tensor, main_grad: Tensor) -> None:
    """main_grad [E, N, K] (FP32) += dy^T @ x of each group, for dy [R, N], x [R, K], BF16 or FP32.

    Raises ValueError for other shapes or dtypes.
    """
    if dy.dim() != 2 or x.dim() != 2 or dy.shape[0] != x.shape[0]:
        raise ValueError(
            f"grouped_mm_wgrad takes dy [R, N] and x [R, K] of one R, not {list(dy.shape)} and {list(x.shape)}: "
            "permute both by one map"
        )
    check_total(main_grad, (main_grad.shape[0], dy.shape[1], x.shape[1]))
    check_groups(group_offsets, main_grad.shape[0], x.shape[0], 1)
    backend.op("grouped_mm_wgrad")(dy, x, group_offsets, main_grad)
