"""Arithmetic of the specification: from numbers to codes, and the product of two FP8 matrices with promotion.

Casts: the formula every back end meets bit for bit. For one tile of 128 values along the contraction:
    scale = max(amax, floor) / 448          FP32, correctly rounded division
    scale = next power of two >= scale      when asked; exact, on the exponent bits
    code  = E4M3(clamp(x * (1 / scale), -448, 448))    1 / scale rounded first; the cast rounds to nearest even
The division must not become a multiplication by 1/448, which changes half of all scales. Clamping comes before the
cast because the cast of some PyTorch releases gives NaN above 464 where others saturate. A NaN or an infinity in a tile
makes its scale non-finite, and so everything computed from it. amax is taken on the bit patterns: with the sign
cleared, IEEE numbers are ordered as integers are, NaN on top, and an integer maximum is several times faster than a
BF16 one.

Products:
    out[m, n] = sum over K tiles t of  (sum over k in t of a[m, k] * b[n, k]) * scale_a[m, t] * scale_b[n, t]
The inner sum, of at most 128 products of codes, is what a tensor core accumulates; multiplied by its scales it is added
into an FP32 sum (promotion, every 128 of K). Here both sums are true FP32. Speed on a CPU: codes have four significant
bits, so they are exact in BF16, and an FP32 matrix product computed "in BF16" (oneDNN, AMX) gives the exact products
with FP32 accumulation at four times the speed of FP32. Where all scales are powers of two (and the device can be asked
without a stall: a CPU), code x scale is exact in BF16 too, and a scale commutes with every FP32 rounding: the same sum
is then formed by one product of the dequantized operands, in another association, at a third of the cost.

Work goes in chunks of rows that stay in a core's cache.
"""

from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import (
    BLOCK_TILE,
    DECODE_GAIN,
    E4M3,
    E4M3_MAX,
    TILE,
    Fp8Tensor,
    ceil_div,
    decode,
    half_codes,
    multiply_tiles,
)

_CHUNK = 1 << 17  # values of one pass: 512 KiB of FP32
_MAGNITUDE = {torch.bfloat16: (torch.int16, 0x7FFF), torch.float32: (torch.int32, 0x7FFFFFFF)}


def row_chunks(m: int, k: int) -> list[slice]:
    """Slices that cover m rows of k values: whole 128-row tiles (the last may be short), about _CHUNK values each."""
    step = max(1, _CHUNK // (TILE * max(k, 1))) * TILE
    return [slice(start, min(start + step, m)) for start in range(0, m, step)]


def empty_rows(m: int, k: int, device: torch.device) -> Fp8Tensor:
    """An unfilled [M, K] tensor of 1x128 tiles, scales token-major."""
    return Fp8Tensor(
        torch.empty(m, k, dtype=E4M3, device=device),
        torch.empty(m, ceil_div(k, TILE), dtype=torch.float32, device=device),
    )


def empty_columns(m: int, k: int, device: torch.device) -> Fp8Tensor:
    """An unfilled columns tensor [K, M] for x [M, K]: codes and scales are transposed views of memory in x's order."""
    return Fp8Tensor(
        torch.empty(m, k, dtype=E4M3, device=device).t(),
        torch.empty(ceil_div(m, TILE), k, dtype=torch.float32, device=device).t(),
    )


def encode_rows(
    values: Tensor, amax: Tensor, out: Fp8Tensor, rows: slice, amax_floor: float, power_of_two: bool, *, last: bool
) -> None:
    """Quantize `values` [m, K] (FP32), rows `rows` of the whole, by 1x128 tiles into those rows of `out` [M, K].

    amax: `tile_amax` of the values along dim -1. last: nobody reads `values` afterwards, they may be overwritten.
    """
    scale = scale_of(amax, amax_floor, power_of_two)
    out.scale[rows] = scale
    scaled = multiply_tiles(values, scale.reciprocal(), values if last else torch.empty_like(values))
    out.data[rows].copy_(scaled.clamp_(-E4M3_MAX, E4M3_MAX))


def encode_columns(
    values: Tensor, amax: Tensor, out: Fp8Tensor, rows: slice, amax_floor: float, power_of_two: bool
) -> None:
    """Quantize `values` [m, K] (FP32, overwritten), rows `rows` of the whole, by 128x1 tiles into `out` [K, M].

    `rows` starts on a multiple of 128; `out` is made by `empty_columns`; amax: `tile_amax` along dim 0.
    """
    scale = scale_of(amax, amax_floor, power_of_two)
    out.scale.t()[rows.start // TILE : ceil_div(rows.stop, TILE)] = scale
    transposed = values.t()
    multiply_tiles(transposed, scale.reciprocal().t(), transposed)
    out.data.t()[rows].copy_(values.clamp_(-E4M3_MAX, E4M3_MAX))


def magnitude_bits(x: Tensor) -> Tensor:
    """|x| as integers of the same order (int16 for BF16, int32 for FP32)."""
    integer, mask = _MAGNITUDE[x.dtype]
    return x.view(integer) & mask


def tile_amax(magnitude: Tensor, dim: int) -> Tensor:
    """Largest of each run of 128 `magnitude_bits` along `dim` (0 or -1), as FP32; the last run may be short."""
    size = magnitude.shape[dim]
    full = size // TILE * TILE
    parts = []
    if full:
        head = magnitude if full == size else magnitude.narrow(dim, 0, full)
        parts.append(head.unflatten(dim, (full // TILE, TILE)).amax(dim=1 if dim == 0 else -1))
    if full < size:
        parts.append(magnitude.narrow(dim, full, size - full).amax(dim=dim, keepdim=True))
    bits = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    return bits.view(torch.bfloat16).float() if bits.dtype is torch.int16 else bits.view(torch.float32)


def scale_of(amax: Tensor, amax_floor: float, power_of_two: bool, largest: float = E4M3_MAX) -> Tensor:
    """The scale of a tile from its largest magnitude, both FP32; `largest` is the format's."""
    # Division by a tensor: CUDA turns a division by a Python number into a multiplication by its reciprocal.
    scale = amax.clamp(min=amax_floor) / torch.full_like(amax, largest)
    if not power_of_two:
        return scale
    # A mantissa that isn't zero carries into the exponent, then the mantissa is cleared: rounds up, exactly.
    up = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.maximum(up, scale)  # up >= scale, but for a NaN, which the integers lose


def write_blocks(w: Tensor, blocks: Fp8Tensor, transposed: Fp8Tensor, amax_floor: float, power_of_two: bool) -> None:
    """Cast w [..., N, K] by 128x128 blocks into `blocks` [..., N, K] and `transposed` [..., K, N], both contiguous."""
    n = w.shape[-2]
    row_amax = tile_amax(magnitude_bits(w), -1)
    amax = [row_amax[..., start : start + TILE, :].amax(-2, keepdim=True) for start in range(0, n, TILE)]
    scale = scale_of(torch.cat(amax, -2), amax_floor, power_of_two)
    inverse = scale.reciprocal().repeat_interleave(TILE, dim=-2)[..., :n, :]
    values = w.to(torch.float32, copy=True)
    blocks.data.copy_(multiply_tiles(values, inverse, values).clamp_(-E4M3_MAX, E4M3_MAX))
    transposed.data.view(torch.uint8).copy_(blocks.data.view(torch.uint8).mT)
    blocks.scale.copy_(scale)
    transposed.scale.copy_(scale.mT)


_mkldnn: Any = torch.backends.mkldnn  # a class in the place of a module, whose attributes type checkers miss
FAST_BF16 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")  # elsewhere FP32 products are faster
_PRODUCT_CHUNK = 1 << 18  # values of one partial product: 1 MiB of FP32


class ExactBf16Products:
    """Scope in which a CPU FP32 matrix product rounds its operands to BF16: free where they are exact in it.

    Limit: the setting is oneDNN's, of the whole process. While a scope is open, an FP32 product of inexact operands on
    another thread would be rounded too. Threads beside the one that computes only move rows (`parallel.stream`), and
    what they add up they add without products; who starts a thread that multiplies must not use the specification.
    """

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
    """Slices of whole tiles that cover `length`, alike in size, each of at most about _PRODUCT_CHUNK values."""
    most = max(1, _PRODUCT_CHUNK // (TILE * max(width, 1)))
    tiles = max(1, ceil_div(length, TILE))
    step = ceil_div(tiles, ceil_div(tiles, most)) * TILE  # a last product of few rows would be a slow one
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _powers_of_two(a: Fp8Tensor, b: Fp8Tensor) -> bool:
    """Whether code x scale is a BF16 number throughout; False wherever asking would stall the device."""
    return a.device.type == "cpu" and not any(
        bool((scale.view(torch.int32) & 0x7FFFFF).any()) for scale in (b.scale, a.scale)
    )
