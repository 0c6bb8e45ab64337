"""The embedding's weight gradient: rows of dy added into FP32 `main_grad` at their ids, in the order of the tokens.

A frequent token sums thousands of rows, which BF16 would lose, and whose sum depends on their order: a scatter with
atomics was refused, a run would not repeat itself.
"""

import torch
from torch import Tensor

from fp8moe.kernels import backend
from fp8moe.kernels.fp8 import check_total


def embedding_wgrad(dy: Tensor, ids: Tensor, main_grad: Tensor) -> None:
    """main_grad [V, D] (FP32) at row ids[t] += dy[t], for t = 0, 1, ... in FP32; dy [T, D] BF16 or FP32, ids int64 [T].

    ids are those of a forward: below V, which a GPU does not check again. Raises ValueError for other shapes or dtypes,
    or tensors of several devices.
    """
    if dy.dim() != 2 or dy.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"embedding_wgrad takes dy [T, D] in BF16 or FP32, not {dy.dtype} {list(dy.shape)}: flatten")
    if ids.shape != dy.shape[:1] or ids.dtype is not torch.int64 or ids.device != dy.device:
        raise ValueError(
            f"ids must be int64 [{dy.shape[0]}] on {dy.device}, got {ids.dtype} {list(ids.shape)} on {ids.device}: "
            "give one for each row of dy"
        )
    if main_grad.dim() != 2 or not main_grad.is_contiguous():
        layout = "contiguous" if main_grad.is_contiguous() else "strided"
        raise ValueError(
            f"main_grad must be contiguous [V, {dy.shape[1]}], got {layout} {list(main_grad.shape)}: use the weight's"
        )
    check_total(main_grad, (main_grad.shape[0], dy.shape[1]))
    backend.op("embedding_wgrad")(dy, ids, main_grad)
