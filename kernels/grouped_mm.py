"""Grouped BF16 and FP32 matrix products, one for each expert: `grouped_mm`, and the weight gradient `grouped_mm_wgrad`.

Groups may start anywhere; nothing is scaled, so nothing must be aligned. Sums are FP32. The weight gradient is added
into FP32 `main_grad` without a rounding between, which `torch.nn.functional.grouped_mm` cannot do: it writes BF16. In
the forward and for the input's gradient that function runs on a GPU; rows that it leaves unwritten are zeroed.
"""

import torch
from torch import Tensor

from fp8moe.kernels import backend
from fp8moe.kernels.fp8 import check_groups, check_total

_DTYPES = (torch.bfloat16, torch.float32)


def grouped_mm(x: Tensor, w: Tensor, group_offsets: Tensor) -> Tensor:
    """x [R, K], w [E, N, K] of one dtype (BF16 or FP32), group_offsets int32 [E+1] -> x[rows of e] @ w[e]^T [R, N].

    w may be a transposed view. Groups may be empty. Rows past group_offsets[-1] are not read, and zero in the result.
    Raises ValueError for other shapes or dtypes.
    """
    if x.dtype != w.dtype or x.dtype not in _DTYPES:
        raise ValueError(f"grouped_mm takes BF16 or FP32, one for both, not {x.dtype} and {w.dtype}: cast one")
    if x.dim() != 2 or w.dim() != 3 or x.shape[1] != w.shape[2]:
        raise ValueError(
            f"grouped_mm takes x [R, K] and w [E, N, K] of one K, not {list(x.shape)} and {list(w.shape)}: transpose w"
        )
    check_groups(group_offsets, w.shape[0], x.shape[0], 1)
    return backend.op("grouped_mm")(x, w, group_offsets)


def grouped_mm_wgrad(dy: Tensor, x: Tensor, group_offsets: Tensor, main_grad: Tensor) -> None:
    """main_grad [E, N, K] (FP32) += dy^T @ x of each group, for dy [R, N], x [R, K], BF16 or FP32.

    An empty group adds nothing; rows past group_offsets[-1] are not read.
    Raises ValueError for other shapes or dtypes.
    """
    if dy.dim() != 2 or x.dim() != 2 or dy.shape[0] != x.shape[0]:
        raise ValueError(
            f"grouped_mm_wgrad takes dy [R, N] and x [R, K] of one R, not {list(dy.shape)} and {list(x.shape)}: "
            "permute both by one map"
        )
    if dy.dtype not in _DTYPES or x.dtype not in _DTYPES:
        raise ValueError(f"grouped_mm_wgrad takes BF16 or FP32, not {dy.dtype} and {x.dtype}: cast them")
    check_total(main_grad, (main_grad.shape[0], dy.shape[1], x.shape[1]))
    check_groups(group_offsets, main_grad.shape[0], x.shape[0], 1)
    backend.op("grouped_mm_wgrad")(dy, x, group_offsets, main_grad)
