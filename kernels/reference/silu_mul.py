"""SwiGLU without casts: silu(gate) * up * weight, all arithmetic in FP32, one rounding to the dtype of the input.

Rows go in chunks whose FP32 copies stay in a core's cache, and in place where a value has no other reader: the same
operations in the same order as whole passes, and the same bits.
"""

import torch
from torch import Tensor

from fp8moe.kernels.reference._activation import activate_clamped, differentiate_clamped
from fp8moe.kernels.reference._arithmetic import row_chunks


def silu_mul(gate_up: Tensor, weights: Tensor | None = None, *, limit: float | None = None) -> Tensor:
    r, both = gate_up.shape
    out = torch.empty(r, both // 2, dtype=gate_up.dtype, device=gate_up.device)
    for rows in row_chunks(r, both):
        gate, up = gate_up[rows].float().chunk(2, dim=-1)
        product = torch.nn.functional.silu(gate).mul_(up) if limit is None else activate_clamped(gate, up, limit)
        out[rows] = product if weights is None else product.mul_(weights[rows, None])
    return out


def silu_mul_backward(
    dy: Tensor, gate_up: Tensor, weights: Tensor | None = None, *, limit: float | None = None
) -> tuple[Tensor, Tensor | None]:
    r, both = gate_up.shape
    out = torch.empty(r, both, dtype=gate_up.dtype, device=gate_up.device)
    dweights = None if weights is None else torch.empty(r, dtype=torch.float32, device=dy.device)
    for rows in row_chunks(r, both):
        gate, up = gate_up[rows].to(torch.float32, copy=True).chunk(2, dim=-1)
        d_hidden = dy[rows].to(torch.float32, copy=True)
        if limit is not None:
            d_gate, d_up, d_weight = differentiate_clamped(gate, up, d_hidden, limit)
            if weights is not None and dweights is not None:
                dweights[rows] = d_weight
                d_gate, d_up = d_gate.mul_(weights[rows, None]), d_up.mul_(weights[rows, None])
            out[rows, : both // 2], out[rows, both // 2 :] = d_gate, d_up
            continue
        sigmoid = gate.sigmoid()
        silu = gate.mul_(sigmoid)
        if weights is not None and dweights is not None:
            dweights[rows] = (d_hidden * silu).mul_(up).sum(-1)
            d_hidden.mul_(weights[rows, None])
        slope = (1 - sigmoid).mul_(silu).add_(sigmoid)
        out[rows, : both // 2] = up.mul_(d_hidden).mul_(slope)
        out[rows, both // 2 :] = d_hidden.mul_(silu)
    return out, dweights
