"""SwiGLU fused with quantization: h = silu(gate) * up * weight, all arithmetic in FP32, one rounding at the cast.

Backward starts from the FP8 copy of gate and up that forward kept, and recomputes:
    sigma = sigmoid(gate)       silu = gate * sigma
    d up   = dh * silu          d gate = dh * up * (sigma + silu * (1 - sigma))      dh = dy * weight
    d weight = sum over F of dy * silu * up
With a limit L (GPT-OSS) g = min(gate, L), u = up within +-L, h = g * sigmoid(1.702 g) * (u + 1) * weight:
    sigma = sigmoid(1.702 g)
    d up   = dh * g * sigma where |up| <= L
    d gate = dh * (u + 1) * sigma * (1 + 1.702 g * (1 - sigma)) where gate <= L
    d weight = sum over F of dy * g * sigma * (u + 1)
"""

from itertools import pairwise

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR, GRADIENT_AMAX_FLOOR, Fp8Tensor, decode
from fp8moe.kernels.reference._activation import activate_clamped, differentiate_clamped
from fp8moe.kernels.reference._arithmetic import (
    empty_columns,
    empty_rows,
    encode_columns,
    encode_rows,
    magnitude_bits,
    row_chunks,
    tile_amax,
)


def swiglu(
    gate_up: Tensor,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    group_offsets: Tensor | None = None,
    *,
    limit: float | None = None,
    power_of_two: bool = False,
) -> tuple[Fp8Tensor, Fp8Tensor]:
    if bias is not None:
        assert group_offsets is not None
        gate_up = _biased(gate_up, bias, group_offsets)
    r, both = gate_up.shape
    cast = (ACTIVATION_AMAX_FLOOR, power_of_two)
    out, cached = empty_rows(r, both // 2, gate_up.device), empty_rows(r, both, gate_up.device)
    for rows in row_chunks(r, both):
        part = gate_up[rows]
        values = part.to(torch.float32, copy=True)
        h = _activate(values, None if weights is None else weights[rows], limit)
        encode_rows(values, tile_amax(magnitude_bits(part), -1), cached, rows, *cast, last=True)
        encode_rows(h, tile_amax(magnitude_bits(h), -1), out, rows, *cast, last=True)
    return out, cached


def swiglu_columns(cached: Fp8Tensor, weights: Tensor | None = None, *, limit: float | None = None) -> Fp8Tensor:
    r, both = cached.shape
    out = empty_columns(r, both // 2, cached.device)
    for rows in row_chunks(r, both):
        gate_up = decode(cached.data[rows], cached.scale[rows])
        h = _activate(gate_up, None if weights is None else weights[rows], limit)
        encode_columns(h, tile_amax(magnitude_bits(h), 0), out, rows, ACTIVATION_AMAX_FLOOR, True)
    return out


def swiglu_backward(
    dy: Tensor,
    cached: Fp8Tensor,
    weights: Tensor | None = None,
    *,
    limit: float | None = None,
    power_of_two: bool = False,
) -> tuple[Fp8Tensor, Fp8Tensor, Tensor | None]:
    r, both = cached.shape
    cast = (GRADIENT_AMAX_FLOOR, power_of_two)
    by_rows, by_columns = empty_rows(r, both, dy.device), empty_columns(r, both, dy.device)
    dweights = None if weights is None else torch.empty(r, dtype=torch.float32, device=dy.device)
    for rows in row_chunks(r, both):
        gate_up = decode(cached.data[rows], cached.scale[rows])
        weight = None if weights is None else weights[rows, None]
        dweight = _differentiate(gate_up, dy[rows].float(), weight, limit)
        if dweights is not None and dweight is not None:
            dweights[rows] = dweight
        magnitude = magnitude_bits(gate_up)
        encode_rows(gate_up, tile_amax(magnitude, -1), by_rows, rows, *cast, last=False)
        encode_columns(gate_up, tile_amax(magnitude, 0), by_columns, rows, *cast)
    return by_rows, by_columns, dweights


def _biased(gate_up: Tensor, bias: Tensor, group_offsets: Tensor) -> Tensor:
    """gate_up [R, 2F] in FP32, each row plus its expert's bias; rows past the last group as they are."""
    values = gate_up.to(torch.float32, copy=True)
    for of_expert, (start, stop) in zip(bias.float(), pairwise(group_offsets.tolist()), strict=True):
        values[start:stop] += of_expert
    return values


def _activate(gate_up: Tensor, weights: Tensor | None, limit: float | None) -> Tensor:
    """silu(gate) * up * weight, or its clamped kind, for gate_up [m, 2F] FP32 -> [m, F] FP32."""
    gate, up = gate_up.chunk(2, dim=1)
    h = torch.nn.functional.silu(gate).mul_(up) if limit is None else activate_clamped(gate, up, limit)
    return h if weights is None else h.mul_(weights[:, None])


def _differentiate(gate_up: Tensor, dy: Tensor, weight: Tensor | None, limit: float | None) -> Tensor | None:
    """Turn gate_up [m, 2F] FP32 into its gradient, in place, for dy [m, F] FP32; returns d weight [m]."""
    gate, up = gate_up.chunk(2, dim=1)
    if limit is not None:
        d_gate, d_up, d_weight = differentiate_clamped(gate, up, dy, limit)
        torch.mul(d_gate, 1 if weight is None else weight, out=gate)
        torch.mul(d_up, 1 if weight is None else weight, out=up)
        return None if weight is None else d_weight
    sigma = torch.sigmoid(gate)
    silu = gate * sigma
    slope = sigma.addcmul_(silu, 1 - sigma).mul_(dy)
    silu.mul_(dy)
    dweight = None
    if weight is not None:
        dweight = (silu * up).sum(dim=1)
        slope.mul_(weight)
        silu.mul_(weight)
    torch.mul(slope, up, out=gate)
    up.copy_(silu)
    return dweight
