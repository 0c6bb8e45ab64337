"""From numbers to codes: the formula every back end meets bit for bit.

For one tile of 128 values along the contraction:
    scale = max(amax, floor) / 448          FP32, correctly rounded division
    scale = next power of two >= scale      when asked; exact, on the exponent bits
    code  = E4M3(clamp(x * (1 / scale), -448, 448))    1 / scale rounded first; the cast rounds to nearest even
The division must not become a multiplication by 1/448, which changes half of all scales. Clamping comes before the
cast because the cast of some PyTorch releases gives NaN above 464 where others saturate. A NaN or an infinity in a tile
makes its scale non-finite, and so everything computed from it.

amax is taken on the bit patterns: with the sign cleared, IEEE numbers are ordered as integers are, NaN on top, and an
integer maximum is several times faster than a BF16 one. Work goes in chunks of rows that stay in a core's cache; every
function here writes one such chunk.
"""

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import E4M3, E4M3_MAX, TILE, Fp8Tensor, ceil_div, multiply_tiles

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
