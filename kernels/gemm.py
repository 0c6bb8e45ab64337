"""FP8 GEMM with block scales and promotion, and the weight gradient of Linears that stay unquantized.

out = a @ b^T. a: activations or gradients by 1x128 tiles. b: a weight by 128x128 blocks (Fprop; Dgrad with the
transposed weight), or a second 1x128 operand (Wgrad: both are columns). Each 128 of K the partial product of codes is
multiplied by its scales and added into an FP32 accumulator, because an FP8 tensor core keeps only about 14 bits
(DeepSeek-V3 report, section 3.3.2). `torch.nn.functional.scaled_mm` was refused as the specification: it has no
block-wise scaling on a CPU.
"""

import torch
from torch import Tensor

from fp8moe.kernels import backend
from fp8moe.kernels.fp8 import BLOCK_TILE, ROW_TILE, Fp8Tensor, check_sizes, check_total


def gemm(
    a: Fp8Tensor, b: Fp8Tensor, *, out_dtype: torch.dtype = torch.bfloat16, accumulate: Tensor | None = None
) -> Tensor:
    """a rows [M, K], b [N, K] -> a @ b^T [M, N] in `out_dtype` (BF16 or FP32), K and N multiples of 16.

    accumulate: FP32 [M, N]; the product is added into it and it is returned, whatever `out_dtype` is.
    Raises ValueError for other tiles, shapes or dtypes.
    """
    if a.tile != ROW_TILE or b.tile not in (ROW_TILE, BLOCK_TILE):
        raise ValueError(
            f"gemm takes a by {ROW_TILE} and b by {BLOCK_TILE} or {ROW_TILE} tiles, not {a.tile} and {b.tile}: "
            "quantize a by rows"
        )
    a_shape, b_shape = a.data.shape, b.data.shape
    if len(a_shape) != 2 or len(b_shape) != 2 or a_shape[1] != b_shape[1]:
        raise ValueError(
            f"gemm takes a [M, K] and b [N, K] of one K, not {list(a_shape)} and {list(b_shape)}: flatten or transpose"
        )
    check_sizes(K=a_shape[1], N=b_shape[0])
    if out_dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"gemm writes torch.bfloat16 or torch.float32, not {out_dtype}: cast afterwards")
    if accumulate is not None:
        check_total(accumulate, (a_shape[0], b_shape[0]))
    return backend.op("gemm")(a, b, out_dtype=out_dtype, accumulate=accumulate)


def wgrad(dy: Tensor, x: Tensor, main_grad: Tensor) -> None:
    """main_grad [N, K] (FP32) += dy^T @ x for dy [T, N], x [T, K], BF16 or FP32; products and sums in FP32.

    Raises ValueError for other shapes or dtypes.
    """
    if dy.dim() != 2 or x.dim() != 2 or dy.shape[0] != x.shape[0]:
        raise ValueError(
            f"wgrad takes dy [T, N] and x [T, K] of one T, not {list(dy.shape)} and {list(x.shape)}: flatten both"
        )
    check_total(main_grad, (dy.shape[1], x.shape[1]))
    backend.op("wgrad")(dy, x, main_grad)
