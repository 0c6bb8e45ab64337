"""How exact SwiGLU is on a device, where ex2 and rcp are approximations: FP64 values and the errors that FP32 may have.

A cast is right when its scales and codes are those of FP32 values within that bound: rounding and the formula of a
scale never decrease, so the values at both ends of the bound enclose what may come out. Where the value lies on no
rounding boundary both ends have the same code, and nothing else is accepted.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import E4M3, E4M3_MAX, TILE, Fp8Tensor
from fp8moe.kernels.reference._arithmetic import scale_of

ULP = 2.0**-23
TINY = 2.0**-126  # what is smaller the hardware's approximations flush to zero
LAST = 2.0**-149  # the step of the smallest FP32 numbers


class Bounded(NamedTuple):
    """FP64 values and the largest error of each."""

    value: Tensor
    error: Tensor

    def t(self) -> "Bounded":
        return Bounded(self.value.t(), self.error.t())

    def assert_contains(self, x: Tensor) -> None:
        """Every x is a number of its dtype next to a value within the bound."""
        rounding = 0 if x.dtype is torch.float32 else self.value.abs() * 2.0**-8 + 2.0**-133
        far = (x.double() - self.value).abs() > self.error + rounding
        assert not bool(far.any()), f"{int(far.sum())} of {x.numel()} values are beyond their bound"


def sigmoid(gate: Tensor, alpha: float = 1.0) -> Bounded:
    """What `encode.sigmoid` promises; of alpha x gate, whose product and alpha are rounded first."""
    x, steps = alpha * gate, 1 if alpha == 1 else 3
    value = torch.sigmoid(x)
    return Bounded(value, value * (2 * ULP + (1 - value) * (2 * ULP + steps * x.abs() * ULP)) + TINY)


def clamped(gate_up: Tensor, limit: float | None) -> tuple[float, Tensor, Tensor]:
    """(alpha, gate, what multiplies gate x sigmoid) in FP64: up, or with a limit the clamped up + 1."""
    gate, up = gate_up.double().chunk(2, dim=1)
    return (1.0, gate, up) if limit is None else (1.702, gate.clamp(max=limit), up.clamp(-limit, limit) + 1)


def activate(gate_up: Tensor, weights: Tensor | None, limit: float | None = None) -> Bounded:
    """silu(gate) * up * weight, or with a limit the clamped kind."""
    alpha, gate, up = clamped(gate_up, limit)
    sigma, other = sigmoid(gate, alpha), up * (1 if weights is None else weights.double()[:, None])
    error = (gate * other).abs() * (sigma.error + 4 * ULP * sigma.value) + LAST * (1 + other.abs())
    return Bounded(gate * other * sigma.value, error)


def differentiate(
    gate_up: Tensor, dy: Tensor, weights: Tensor | None, limit: float | None = None
) -> tuple[Bounded, Bounded]:
    """(d gate_up [R, 2F], d weights [R])."""
    alpha, gate, up = clamped(gate_up, limit)
    sigma = sigmoid(gate, alpha)
    weight = 1 if weights is None else weights.double()[:, None]
    upstream = Bounded(dy.double() * sigma.value, dy.double().abs() * (sigma.error + ULP * sigma.value) + LAST)
    slope = 1 + alpha * gate * (1 - sigma.value)
    slope_error = alpha * gate.abs() * (sigma.error + 2 * ULP) + ULP * (1 + slope.abs())
    d_gate = upstream.value * up * weight * slope
    d_gate_error = (up * weight).abs() * (upstream.error * slope.abs() + upstream.value.abs() * slope_error)
    d_up, d_up_error = upstream.value * gate * weight, upstream.error * (gate * weight).abs()
    grads = Bounded(torch.cat([d_gate, d_up], 1), torch.cat([d_gate_error, d_up_error], 1))
    flows = torch.ones_like(gate_up, dtype=torch.float64)
    if limit is not None:
        flows = torch.cat([gate_up.chunk(2, 1)[0] <= limit, gate_up.chunk(2, 1)[1].abs() <= limit], 1).double()
    terms, term_error = upstream.value * gate * up, upstream.error * (gate * up).abs()
    whole = Bounded(terms.sum(1), (term_error + 16 * ULP * terms.abs()).sum(1))
    last = LAST * (1 + weight * (1 + slope.abs()))
    error = grads.error + 4 * ULP * grads.value.abs() + torch.cat([last, last], 1)
    return Bounded(grads.value * flows, error * flows), whole


def assert_cast(q: Fp8Tensor, of: Bounded, amax_floor: float, power_of_two: bool) -> None:
    """q [M, K] is a cast, by 1x128 tiles, of values within the bound."""
    low, high = (torch.nextafter(x.float(), x.new_tensor(limit, dtype=torch.float32)) for x, limit in (
        (of.value - of.error, -torch.inf), (of.value + of.error, torch.inf)
    ))  # fmt: skip
    least = torch.where((low > 0) | (high < 0), torch.minimum(low.abs(), high.abs()), 0)
    most = torch.maximum(low.abs(), high.abs())
    smallest, largest = (scale_of(_tile_amax(x), amax_floor, power_of_two) for x in (least, most))
    assert bool((smallest <= q.scale).all() and (q.scale <= largest).all()), "a scale is none of a value in its bound"
    inverse = q.scale.reciprocal().repeat_interleave(TILE, dim=1)[:, : q.shape[1]]
    codes = q.data.float()
    ends = ((x * inverse).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).float() for x in (low, high))
    below, above = (end for end in ends)
    wrong = (codes < below) | (codes > above)
    assert not bool(wrong.any()), f"{int(wrong.sum())} of {wrong.numel()} codes are none of a value in its bound"


def assert_close_to(q: Fp8Tensor, specified: Fp8Tensor) -> None:
    """Codes are those of the specification but for a few, which are neighbours of them."""
    ours, theirs = (_ordinal(x.data) for x in (q, specified))
    apart = (ours - theirs).abs()
    assert int(apart.max()) <= 1 and float((apart > 0).double().mean()) <= 1e-3


def _ordinal(codes: Tensor) -> Tensor:
    bits = codes.contiguous().view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)


def _tile_amax(x: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % TILE))
    return padded.unflatten(1, (-1, TILE)).amax(-1)
