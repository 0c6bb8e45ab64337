"""Hopper's FP8 tensor core, emulated: why partial sums are promoted every 128, and what it would cost not to.

For study and for tests; nothing trains with it. The model: one instruction multiplies 32 of K. Each product, exact, has
the exponent that its two factors' exponents add up to; products and accumulator are aligned to the largest exponent
among them and truncated toward zero (not rounded) to 13 fraction bits, then added; the sum is truncated to 13 fraction
bits once more, as the accumulator's registers hold no more (1 sign bit, 8 exponent bits, 13: "FP22").
Truncation always goes toward zero, so on data of one sign the error grows with K; on zero-mean data it hides.

Sources: the DeepSeek-V3 report (arXiv 2412.19437, sections 3.3.2 and 3.5.2) and the ISCA'25 paper, section 3.1.1, which
measured 14 bits; SageAttention2 (arXiv 2411.10958), which found the accumulator's format; MMA-Sim (arXiv 2511.10909),
whose model of an H100's FP8 WGMMA this is: its authors compared it bit by bit with the hardware. Nobody here has.

Arithmetic is FP64, in which products of codes and their aligned sums are exact.
"""

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import BLOCK_TILE, TILE, Fp8Tensor

STEP_K = 32
FRACTION_BITS = 13
LEAST_EXPONENT = -6  # of an E4M3 number: its subnormal numbers have this one


def exponent_of(value: Tensor, least: int) -> Tensor:
    """The exponent of each number, at least `least`; one that never counts for a zero."""
    _, exponent = torch.frexp(value)  # value = mantissa x 2^exponent, mantissa in [0.5, 1)
    return torch.where(value == 0, -999, (exponent - 1).clamp(min=least))


def truncated(value: Tensor, exponent: Tensor, fraction_bits: int) -> Tensor:
    """value cut off, toward zero, `fraction_bits` below 2^exponent."""
    unit = torch.ldexp(torch.ones_like(value), exponent - fraction_bits)
    return (value / unit).trunc() * unit


def tensor_core_dot(a: Tensor, b: Tensor, accumulator: Tensor, fraction_bits: int = FRACTION_BITS) -> Tensor:
    """accumulator [M, N] + a [M, K] @ b [N, K]^T in FP64, as the tensor core adds: 32 of K a step, truncated."""
    total = accumulator.double()
    for first in range(0, a.shape[1], STEP_K):
        left, right = (x[:, first : first + STEP_K].double() for x in (a, b))
        terms = torch.cat([left[:, None] * right, total[..., None]], dim=-1)
        exponents = exponent_of(left, LEAST_EXPONENT)[:, None] + exponent_of(right, LEAST_EXPONENT)
        exponents = torch.cat([exponents, exponent_of(total, -126)[..., None]], dim=-1)
        largest = exponents.amax(dim=-1, keepdim=True).clamp(min=-126)
        total = truncated(terms, largest, fraction_bits).sum(dim=-1)
        total = truncated(total, exponent_of(total, -126).clamp(min=-126), fraction_bits)
    return total


def emulated_gemm(a: Fp8Tensor, b: Fp8Tensor, *, promote_every: int | None = TILE) -> Tensor:
    """a rows [M, K] @ b [N, K]^T in FP32, as a tensor core computes it; b by 1x128 tiles or 128x128 blocks.

    promote_every: after how much of K the partial sum is scaled and added into FP32, a multiple or a divisor of 128;
    None: at the very end. Beyond 128 a sum runs over several tiles, so both scales must be constant along K.
    """
    (m, k), n = a.shape, b.shape[0]
    interval = promote_every or k
    scale_b = b.scale.repeat_interleave(TILE, dim=0)[:n] if b.tile == BLOCK_TILE else b.scale
    if interval > TILE:
        assert bool((a.scale == a.scale[:, :1]).all() and (scale_b == scale_b[:, :1]).all()), "scales vary along K"
    left, right = a.data.float(), b.data.float()
    out = torch.zeros(m, n, device=a.device)
    for first in range(0, k, interval):
        span = slice(first, first + interval)
        partial = tensor_core_dot(left[:, span], right[:, span], torch.zeros_like(out)).float()
        out += partial * a.scale[:, first // TILE, None] * scale_b[:, first // TILE]
    return out
