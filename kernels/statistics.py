"""Statistics of casts: shares of saturated and of underflowed values, counted inside `observe_casts`.

The public quantizers hand every (input, quantized, kind) to the innermost observer; with none, that is one comparison.
Kinds of tensor are activations, gradients (known by their amax floor) and weights.
Saturated means that rounding to nearest would have left the format: |x| > 464 x scale (464 lies halfway between 448 and
the next step), or x is not finite. With amax taken online it stays zero in a healthy run, and a non-zero share means a
scale was not made for its data. Underflowed means: x is not zero, its code is. Counted are the casts of `quantize.py`;
those fused into SwiGLU never have their input in memory.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import BLOCK_TILE, TILE, Fp8Tensor, multiply_tiles
from fp8moe.kernels.quantize import ACTIVATIONS, WEIGHTS, observers

_OVERFLOW = 464.0
_PART = 1 << 24  # values of a weight that are counted at once


class CastStatistics:
    """Counts over all casts observed so far; the shares are of all values, 0.0 when there were none."""

    def __init__(self) -> None:
        self._values: defaultdict[str, int] = defaultdict(int)
        self._saturated: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._underflowed: defaultdict[str, list[Tensor]] = defaultdict(list)

    @property
    def values(self) -> int:
        """Values that were cast."""
        return sum(self._values.values())

    @property
    def saturated_share(self) -> float:
        """Share of values beyond the format, in [0, 1]."""
        return sum(map(_total, self._saturated.values())) / max(self.values, 1)

    @property
    def underflow_share(self) -> float:
        """Share of values that became zero without being zero, in [0, 1]."""
        return sum(map(_total, self._underflowed.values())) / max(self.values, 1)

    def of_kind(self, kind: str) -> tuple[int, int, int]:
        """(values, saturated, underflowed) of the tensors of that kind. Waits for the device."""
        return self._values[kind], _total(self._saturated[kind]), _total(self._underflowed[kind])

    def add(self, x: Tensor, q: Fp8Tensor, kind: str = ACTIVATIONS) -> None:
        """Count the cast of x [..., M, K] to q, a tensor of that kind, without waiting for the device."""
        limit = q.scale * _OVERFLOW
        if q.tile == BLOCK_TILE:
            limit = limit.repeat_interleave(TILE, dim=-2)[..., : q.shape[-2], :]
        magnitude = x.detach().float().abs()
        bound = torch.ones_like(magnitude)
        multiply_tiles(bound, limit, bound)
        zero_code = (q.data.view(torch.uint8) & 0x7F) == 0
        self._values[kind] += x.numel()
        # `not (<=)` counts a NaN too.
        self._saturated[kind].append((~(magnitude <= bound)).sum())
        self._underflowed[kind].append(((magnitude != 0) & zero_code).sum())

    def add_weight(self, w: Tensor, q: Fp8Tensor) -> None:
        """Count the cast of a weight w [..., N, K] to its 128x128 blocks q, in parts: it takes 256 MB at most."""
        w, codes, scales = (x.reshape(-1, *x.shape[-2:]) for x in (w.detach(), q.data, q.scale))
        blocks = max(1, _PART // (TILE * w.shape[-1]))
        for matrix, code, scale in zip(w, codes, scales, strict=True):
            for first in range(0, scale.shape[0], blocks):
                rows = slice(first * TILE, (first + blocks) * TILE)
                part = Fp8Tensor(code[rows], scale[first : first + blocks], BLOCK_TILE)
                self.add(matrix[rows], part, WEIGHTS)


def _total(counts: list[Tensor]) -> int:
    """Their sum, for which a GPU is waited for once."""
    return int(torch.stack(counts).sum()) if counts else 0


@contextmanager
def observe_casts() -> Iterator[CastStatistics]:
    """Scope in which every public quantizer is counted. Scopes nest: the innermost counts."""
    counts = CastStatistics()
    observers.append(counts.add)
    try:
        yield counts
    finally:
        observers.pop()
