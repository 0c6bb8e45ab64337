"""Grouped unquantized products: for each contiguous group of rows the plain product."""

import itertools

import torch
from torch import Tensor

from fp8moe.kernels.reference._arithmetic import FAST_BF16
from fp8moe.kernels.reference.gemm import wgrad


def grouped_mm(x: Tensor, w: Tensor, group_offsets: Tensor) -> Tensor:
    out = torch.empty(x.shape[0], w.shape[1], dtype=x.dtype, device=x.device)
    offsets = group_offsets.tolist()
    through_fp32 = x.device.type == "cpu" and x.dtype is torch.bfloat16 and not FAST_BF16
    for e, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if start == stop:
            continue
        if through_fp32:
            out[start:stop] = x[start:stop].float() @ w[e].float().t()
        else:
            torch.mm(x[start:stop], w[e].t(), out=out[start:stop])
    out[offsets[-1] :] = 0
    return out


def grouped_mm_wgrad(dy: Tensor, x: Tensor, group_offsets: Tensor, main_grad: Tensor) -> None:
    offsets = group_offsets.tolist()
    for e, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if start < stop:
            wgrad(dy[start:stop], x[start:stop], main_grad[e])
