"""The product of two FP8 matrices, with promotion.

    out[m, n] = sum over K tiles t of  (sum over k in t of a[m, k] * b[n, k]) * scale_a[m, t] * scale_b[n, t]

The inner sum, of at most 128 products of codes, is what a tensor core accumulates; multiplied by its scales it is added
into an FP32 sum (promotion, every 128 of K). Here both sums are true FP32.

Speed on a CPU: codes have four significant bits, so they are exact in BF16, and an FP32 matrix product computed "in
BF16" (oneDNN, AMX) gives the exact products with FP32 accumulation at four times the speed of FP32. The setting is
scoped to the call. Work goes in chunks of rows, so that partial products don't leave the cache.

Where all scales are powers of two (and the device can be asked without a stall: a CPU), code x scale is exact in BF16
too, and a scale commutes with every FP32 rounding: the same sum is then formed by one product of the dequantized
operands, in another association, at a third of the cost.
"""

from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import BLOCK_TILE, DECODE_GAIN, TILE, Fp8Tensor, ceil_div, decode, half_codes, multiply_tiles

_mkldnn: Any = torch.backends.mkldnn  # a class in the place of a module, whose attributes type checkers miss
FAST_BF16 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")  # elsewhere FP32 products are faster
_CHUNK = 1 << 18  # values of one partial product: 1 MiB of FP32


class ExactBf16Products:
    """Scope in which a CPU FP32 matrix product rounds its operands to BF16: free where they are exact in it."""

    def __enter__(self) -> None:
        self._before = _mkldnn.matmul.fp32_precision
        _mkldnn.matmul.fp32_precision = "bf16"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _mkldnn.matmul.fp32_precision = self._before


def write_product(out: Tensor, a: Fp8Tensor, b: Fp8Tensor) -> None:
    """out [M, N] (BF16 or FP32) = a @ b^T."""
    with ExactBf16Products():
        if not _powers_of_two(a, b):
            for rows, product in _promoted(a, b):
                out[rows] = product
            return
        dtype = out.dtype if FAST_BF16 else torch.float32
        left = torch.empty(a.shape, dtype=dtype, device=a.device)
        for rows in _chunks(*a.shape):
            left[rows] = decode(a.data[rows], a.scale[rows])
        right = b.dequantize(dtype).t()
        if dtype is out.dtype:
            torch.mm(left, right, out=out)
        else:
            out.copy_(left @ right)


def add_product(total: Tensor, a: Fp8Tensor, b: Fp8Tensor) -> None:
    """total [M, N] (FP32) += a @ b^T."""
    with ExactBf16Products():
        if not _powers_of_two(a, b):
            for rows, product in _promoted(a, b):
                total[rows] += product
            return
        for span in _chunks(a.shape[1], max(total.shape)):
            tiles = slice(span.start // TILE, ceil_div(span.stop, TILE))
            left, right = (Fp8Tensor(x.data[:, span], x.scale[:, tiles], x.tile) for x in (a, b))
            total.addmm_(left.dequantize(), right.dequantize().t())


def _promoted(a: Fp8Tensor, b: Fp8Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, a[rows] @ b^T in FP32)."""
    m, n, k = a.shape[0], *b.shape
    right = half_codes(b.data).float().t()
    scale_b = b.scale * (DECODE_GAIN * DECODE_GAIN)
    for rows in _chunks(m, n):
        left, scale_a = half_codes(a.data[rows]).float(), a.scale[rows]
        total = None
        for tile, first in enumerate(range(0, k, TILE)):
            span = slice(first, first + TILE)
            partial = left[:, span] @ right[span]
            total = _add_scaled(total, partial, scale_a[:, tile, None], scale_b[:, tile], b.tile == BLOCK_TILE)
        yield rows, left.new_zeros(left.shape[0], n) if total is None else total


def _add_scaled(total: Tensor | None, partial: Tensor, scale_a: Tensor, scale_b: Tensor, blocks: bool) -> Tensor:
    """total + partial [m, N] x scale_a [m, 1] x scale_b, which is [ceil(N/128)] for blocks, else [N]; in place."""
    if not blocks:
        partial.mul_(scale_b)
        return partial.mul_(scale_a) if total is None else total.addcmul_(partial, scale_a)
    factor = scale_a * scale_b
    if total is None:
        return multiply_tiles(partial, factor, partial)
    full = total.shape[1] // TILE * TILE
    if full:
        split = (full // TILE, TILE)
        head = partial[:, :full].unflatten(1, split)
        total[:, :full].unflatten(1, split).addcmul_(head, factor[:, : full // TILE, None])
    if full < total.shape[1]:
        total[:, full:].addcmul_(partial[:, full:], factor[:, -1:])
    return total


def _chunks(length: int, width: int) -> list[slice]:
    """Slices of whole tiles that cover `length`, each about _CHUNK values at this width."""
    step = max(1, _CHUNK // (TILE * max(width, 1))) * TILE
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _powers_of_two(a: Fp8Tensor, b: Fp8Tensor) -> bool:
    """Whether code x scale is a BF16 number throughout; False wherever asking would stall the device."""
    return a.device.type == "cpu" and not any(
        bool((scale.view(torch.int32) & 0x7FFFFF).any()) for scale in (b.scale, a.scale)
    )
