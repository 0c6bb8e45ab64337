"""Grouped products: for each contiguous group of rows, or of tokens for the weight gradient, the plain product."""

import itertools

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import TILE, Fp8Tensor
from fp8moe.kernels.reference._arithmetic import add_product, write_product


def grouped_gemm(
    a: Fp8Tensor, b: Fp8Tensor, group_offsets: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    out = torch.empty(a.shape[0], b.shape[1], dtype=out_dtype, device=a.device)
    offsets = group_offsets.tolist()
    for e, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if start < stop:
            rows = Fp8Tensor(a.data[start:stop], a.scale[start:stop])
            write_product(out[start:stop], rows, Fp8Tensor(b.data[e], b.scale[e], b.tile))
    out[offsets[-1] :] = 0
    return out


def grouped_wgrad(dy_columns: Fp8Tensor, x_columns: Fp8Tensor, group_offsets: Tensor, main_grad: Tensor) -> None:
    offsets = group_offsets.tolist()
    for e, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if start < stop:
            add_product(main_grad[e], _tokens(dy_columns, start, stop), _tokens(x_columns, start, stop))


def _tokens(columns: Fp8Tensor, start: int, stop: int) -> Fp8Tensor:
    return Fp8Tensor(columns.data[:, start:stop], columns.scale[:, start // TILE : stop // TILE])
