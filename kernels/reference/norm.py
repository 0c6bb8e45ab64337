"""RMSNorm fused with residual add and casts: r = 1 / sqrt(mean(x^2) + eps), y = (x r) w, FP32 inside, in this order.

The steps and their order are those of `torch.nn.functional.rms_norm` on a CPU, forward and for dx, whose bits come out.
    dx = g r - (sum(g x) r^3 / D) x      g = dy w      dw = sum over T of dy (x r)
"""

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR, Fp8Tensor
from fp8moe.kernels.reference._arithmetic import (
    empty_columns,
    empty_rows,
    encode_columns,
    encode_rows,
    magnitude_bits,
    row_chunks,
    tile_amax,
)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    delta: Tensor | None = None,
    *,
    eps: float,
    tensor: bool = True,
    rows: bool = False,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor, Fp8Tensor, Tensor]:
    t, d = x.shape
    h, y = x.new_empty(0 if delta is None else t, d), x.new_empty(t if tensor else 0, d)
    q = empty_rows(t if rows else 0, d, x.device)
    inverse_rms = torch.empty(t, dtype=torch.float32, device=x.device)
    for part in row_chunks(t, d):
        source = x[part] if delta is None else torch.add(x[part], delta[part], out=h[part])
        values = source.to(torch.float32, copy=True)
        inverse_rms[part] = values.square().mean(-1).add_(eps).rsqrt_()
        normed = _normalize(values, inverse_rms[part], weight, y[part] if tensor else torch.empty_like(source))
        if rows:
            amax, values = tile_amax(magnitude_bits(normed), -1), normed.to(torch.float32, copy=True)
            encode_rows(values, amax, q, part, ACTIVATION_AMAX_FLOOR, power_of_two, last=True)
    return h, y, q, inverse_rms


def rms_norm_columns(x: Tensor, weight: Tensor, inverse_rms: Tensor, *, power_of_two: bool = False) -> Fp8Tensor:
    t, d = x.shape
    out = empty_columns(t, d, x.device)
    for part in row_chunks(t, d):
        values = x[part].to(torch.float32, copy=True)
        normed = _normalize(values, inverse_rms[part], weight, torch.empty_like(x[part]))
        amax, values = tile_amax(magnitude_bits(normed), 0), normed.to(torch.float32, copy=True)
        encode_columns(values, amax, out, part, ACTIVATION_AMAX_FLOOR, power_of_two)
    return out


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor, main_grad: Tensor, residual: Tensor | None = None
) -> Tensor:
    t, d = x.shape
    dx = torch.empty(t, d, dtype=x.dtype, device=x.device)
    total = torch.zeros(d, dtype=torch.float32, device=x.device)
    for part in row_chunks(t, d):
        value, r = x[part].float(), inverse_rms[part, None]
        grad = dy[part].to(torch.float32, copy=True)
        total += (value * r).mul_(grad).sum(0)
        grad *= weight
        along = (grad * value).sum(-1, keepdim=True)
        grad.mul_(r).add_((2 * value).mul_(-0.5 * along * r.pow(3) / d))
        if residual is not None:
            grad += residual[part]
        dx[part] = grad
    main_grad += total
    return dx


def _normalize(values: Tensor, inverse_rms: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """y [m, D] into `out` for x [m, D] in FP32, overwritten; returns `out`."""
    return out.copy_(values.mul_(inverse_rms[:, None]).mul_(weight))
