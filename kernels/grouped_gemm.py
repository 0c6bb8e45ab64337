"""Grouped FP8 GEMM: each expert's rows, contiguous and padded to 128, times that expert's weight (Fprop, Dgrad).

Numerics and scales are `gemm`'s. Groups start on multiples of 128 rows so that a 128-row tile never straddles two
experts; a masked layout with one fixed capacity an expert was refused: no token is dropped here, and the fullest expert
would set the cost of all.
"""

import torch
from torch import Tensor

from fp8moe.kernels import backend
from fp8moe.kernels.fp8 import BLOCK_TILE, ROW_TILE, TILE, Fp8Tensor, check_groups, check_sizes


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
