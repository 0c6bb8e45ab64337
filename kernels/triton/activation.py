"""SwiGLU's arithmetic on a tile, for the kernels with and without casts: plain, or with a LIMIT the clamped kind.

LIMIT is a constant of the kernel: without one (None) its code is that of plain SwiGLU alone.
"""

import triton
import triton.language as tl

from fp8moe.kernels.reference._activation import ALPHA as SPECIFIED_ALPHA
from fp8moe.kernels.triton import encode

ALPHA = tl.constexpr(SPECIFIED_ALPHA)


@triton.jit
def clamped(gate, up, LIMIT: tl.constexpr):
    """gate up to LIMIT and up within +-LIMIT; a NaN stays one."""
    gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    up = tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return gate, tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activated(gate, up, LIMIT: tl.constexpr):
    """silu(gate) * up, or with a limit gate * sigmoid(1.702 gate) * (up + 1) of both clamped."""
    if LIMIT is None:
        product = gate * encode.sigmoid(gate) * up
    else:
        gate, up = clamped(gate, up, LIMIT)
        product = gate * encode.sigmoid(gate * ALPHA) * (up + 1.0)
    return product


@triton.jit
def differentiate_clamped(gate, up, dy, LIMIT: tl.constexpr):
    """`differentiate` with a limit; where a clamp took a value, no gradient passes."""
    inside, within = clamped(gate, up, LIMIT)
    stopped, held = gate - inside > 0.0, tl.abs(up - within) > 0.0  # a NaN is neither
    gate, up = inside, within
    sigma = encode.sigmoid(gate * ALPHA)
    upstream = dy * sigma
    d_up, factor = upstream * gate, up + 1.0
    d_gate = upstream * factor * (1.0 + gate * ALPHA * (1.0 - sigma))
    return tl.where(stopped, 0.0, d_gate), tl.where(held, 0.0, d_up), d_up * factor


@triton.jit
def differentiate(gate, up, dy, LIMIT: tl.constexpr):
    """(d gate, d up, what a routing weight's gradient sums over F), for a weight of one."""
    if LIMIT is None:
        sigma = encode.sigmoid(gate)
        upstream = dy * sigma
        d_up = upstream * gate
        grads = upstream * up * (1.0 + gate * (1.0 - sigma)), d_up, d_up * up
    else:
        grads = differentiate_clamped(gate, up, dy, LIMIT)
    return grads
