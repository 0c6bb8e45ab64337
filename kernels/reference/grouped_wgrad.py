"""Grouped FP8 weight gradient: for each group of tokens the plain GEMM of two columns tensors, added into FP32."""

import itertools

from torch import Tensor

from fp8moe.kernels.fp8 import TILE, Fp8Tensor
from fp8moe.kernels.reference._product import add_product


def grouped_wgrad(dy_columns: Fp8Tensor, x_columns: Fp8Tensor, group_offsets: Tensor, main_grad: Tensor) -> None:
    offsets = group_offsets.tolist()
    for e, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if start < stop:
            add_product(main_grad[e], _tokens(dy_columns, start, stop), _tokens(x_columns, start, stop))


def _tokens(columns: Fp8Tensor, start: int, stop: int) -> Fp8Tensor:
    return Fp8Tensor(columns.data[:, start:stop], columns.scale[:, start // TILE : stop // TILE])
