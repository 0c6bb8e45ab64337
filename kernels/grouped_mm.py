"""Grouped matrix products of unquantized rows: the experts' path when the precision is BF16 or FP32.

Groups may start anywhere: nothing is scaled, so nothing must be aligned. Sums are FP32, the weight gradient is added
into FP32 `main_grad` without a rounding between. `torch.nn.functional.grouped_mm` was refused here: it leaves rows
outside every group unwritten and has no accumulating weight gradient.
"""

import torch
from torch import Tensor

from fp8moe.kernels import backend
from fp8moe.kernels.fp8 import check_groups, check_total


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
