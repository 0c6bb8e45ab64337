"""Quantization by rows, by columns, by blocks: which values share a scale. The formula is `_encode`'s."""

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import (
    ACTIVATION_AMAX_FLOOR,
    BLOCK_TILE,
    E4M3,
    Fp8Tensor,
    decode,
    scale_shape,
)
from fp8moe.kernels.reference._arithmetic import (
    empty_columns,
    empty_rows,
    encode_columns,
    encode_rows,
    magnitude_bits,
    row_chunks,
    tile_amax,
    write_blocks,
)


def quantize_rows(x: Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR, power_of_two: bool = False) -> Fp8Tensor:
    flat = x.flatten(0, -2)
    m, k = flat.shape
    out = empty_rows(m, k, x.device)
    for rows in row_chunks(m, k):
        part = flat[rows]
        amax = tile_amax(magnitude_bits(part), -1)
        encode_rows(_as_float(part), amax, out, rows, amax_floor, power_of_two, last=True)
    return Fp8Tensor(out.data.view(x.shape), out.scale.view(*x.shape[:-1], out.scale.shape[1]))


def quantize_columns(x: Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR, power_of_two: bool = False) -> Fp8Tensor:
    m, k = x.shape
    out = empty_columns(m, k, x.device)
    for rows in row_chunks(m, k):
        part = x[rows]
        amax = tile_amax(magnitude_bits(part), 0)
        encode_columns(_as_float(part), amax, out, rows, amax_floor, power_of_two)
    return out


def quantize_rows_and_columns(
    x: Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR, power_of_two: bool = False
) -> tuple[Fp8Tensor, Fp8Tensor]:
    m, k = x.shape
    by_rows, by_columns = empty_rows(m, k, x.device), empty_columns(m, k, x.device)
    for rows in row_chunks(m, k):
        part = x[rows]
        magnitude, values = magnitude_bits(part), _as_float(part)
        encode_rows(values, tile_amax(magnitude, -1), by_rows, rows, amax_floor, power_of_two, last=False)
        encode_columns(values, tile_amax(magnitude, 0), by_columns, rows, amax_floor, power_of_two)
    return by_rows, by_columns


def quantize_blocks(
    w: Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR, power_of_two: bool = False
) -> tuple[Fp8Tensor, Fp8Tensor]:
    *leading, n, k = w.shape
    blocks, transposed = (
        Fp8Tensor(
            torch.empty(shape, dtype=E4M3, device=w.device),
            torch.empty(scale_shape(shape, BLOCK_TILE), device=w.device),
            BLOCK_TILE,
        )
        for shape in ((*leading, n, k), (*leading, k, n))
    )
    write_blocks(w, blocks, transposed, amax_floor, power_of_two)
    return blocks, transposed


def requantize_columns(rows: Fp8Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR) -> Fp8Tensor:
    m, k = rows.shape
    out = empty_columns(m, k, rows.device)
    for chunk in row_chunks(m, k):
        x = decode(rows.data[chunk], rows.scale[chunk])
        encode_columns(x, tile_amax(magnitude_bits(x), 0), out, chunk, amax_floor, True)
    return out


def _as_float(x: Tensor) -> Tensor:
    """A copy of x in FP32."""
    return x.to(torch.float32, copy=True)
