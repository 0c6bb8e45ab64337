"""Hopper's FP8 tensor core, emulated: why partial sums are promoted every 128, and what it would cost not to.

For study and for tests; nothing trains with it. The model: one step multiplies 32 of K. The 32 products, exact, and the
accumulator are aligned to the largest exponent among them and truncated (not rounded) to 13 fraction bits, then added.
Truncation always goes toward zero, so on data of one sign the error grows with K; on zero-mean data it hides.
(DeepSeek-V3 report, section 3.5.2; ISCA'25 paper, section 3.1.1.)

Arithmetic is FP64, in which products of codes and their aligned sums are exact.
"""

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import BLOCK_TILE, TILE, Fp8Tensor

STEP_K = 32
FRACTION_BITS = 13


def tensor_core_dot(a: Tensor, b: Tensor, accumulator: Tensor, fraction_bits: int = FRACTION_BITS) -> Tensor:
    """accumulator [M, N] + a [M, K] @ b [N, K]^T in FP64, as the tensor core adds: 32 of K a step, truncated."""
    total = accumulator.double()
    for first in range(0, a.shape[1], STEP_K):
        span = slice(first, first + STEP_K)
        products = a[:, None, span].double() * b[None, :, span].double()
        terms = torch.cat([products, total[..., None]], dim=-1)
        largest = terms.abs().amax(dim=-1, keepdim=True)
        _, exponent = torch.frexp(largest)  # largest = mantissa x 2^exponent, mantissa in [0.5, 1)
        unit = torch.ldexp(torch.ones_like(largest), exponent - 1 - fraction_bits)
        total = ((terms / unit).trunc() * unit).sum(dim=-1)
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
