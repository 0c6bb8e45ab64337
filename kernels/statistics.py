"""Statistics of casts: shares of saturated and of underflowed values, counted inside `observe_casts`.

The public quantizers hand every pair (input, quantized) to the innermost observer; with none, that is one comparison.
Saturated means that rounding to nearest would have left the format: |x| > 464 x scale (464 lies halfway between 448 and
the next step), or x is not finite. With amax taken online it stays zero in a healthy run, and a non-zero share means a
scale was not made for its data. Underflowed means: x is not zero, its code is. Counted are the casts of `quantize.py`;
those fused into SwiGLU never have their input in memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import BLOCK_TILE, TILE, Fp8Tensor, multiply_tiles
from fp8moe.kernels.quantize import observers

_OVERFLOW = 464.0


class CastStatistics:
    """Counts over all casts observed so far; the shares are of all values, 0.0 when there were none."""

    def __init__(self) -> None:
        self.values = 0
        self._saturated: list[Tensor] = []
        self._underflowed: list[Tensor] = []

    @property
    def saturated_share(self) -> float:
        """Share of values beyond the format, in [0, 1]."""
        return self._share(self._saturated)

    @property
    def underflow_share(self) -> float:
        """Share of values that became zero without being zero, in [0, 1]."""
        return self._share(self._underflowed)

    def add(self, x: Tensor, q: Fp8Tensor) -> None:
        """Count the cast of x [..., M, K] to q, without waiting for the device."""
        limit = q.scale * _OVERFLOW
        if q.tile == BLOCK_TILE:
            limit = limit.repeat_interleave(TILE, dim=-2)[..., : q.shape[-2], :]
        magnitude = x.detach().float().abs()
        bound = torch.ones_like(magnitude)
        multiply_tiles(bound, limit, bound)
        zero_code = (q.data.view(torch.uint8) & 0x7F) == 0
        self.values += x.numel()
        # `not (<=)` counts a NaN too.
        self._saturated.append((~(magnitude <= bound)).sum())
        self._underflowed.append(((magnitude != 0) & zero_code).sum())

    def _share(self, counts: list[Tensor]) -> float:
        return sum(int(count) for count in counts) / self.values if self.values else 0.0


@contextmanager
def observe_casts() -> Iterator[CastStatistics]:
    """Scope in which every public quantizer is counted. Scopes nest: the innermost counts."""
    counts = CastStatistics()
    observers.append(counts.add)
    try:
        yield counts
    finally:
        observers.pop()
