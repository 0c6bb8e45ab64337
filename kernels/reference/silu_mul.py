"""SwiGLU without casts: silu(gate) * up * weight, all arithmetic in FP32, one rounding to the dtype of the input."""

import torch
from torch import Tensor


def silu_mul(gate_up: Tensor, weights: Tensor | None = None) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    product = torch.nn.functional.silu(gate) * up
    return (product if weights is None else product * weights[:, None]).to(gate_up.dtype)


def silu_mul_backward(dy: Tensor, gate_up: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    gate, up = gate_up.float().chunk(2, dim=-1)
    dy = dy.float()
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    dweights = None if weights is None else (dy * silu * up).sum(-1)
    if weights is not None:
        dy = dy * weights[:, None]
    dgate = dy * up * (sigmoid + silu * (1 - sigmoid))
    return torch.cat([dgate, dy * silu], dim=-1).to(gate_up.dtype), dweights
