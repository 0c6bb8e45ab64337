"""Payload of a message: rows as bytes.

An FP8 row is its codes and one byte a scale: scales that are sent are powers of two, and a power of two is its exponent
(the byte of the FP32 format, never 0 because casts keep scales normal; 0 is free and stands for NaN, so that a gradient
that is not finite arrives so). A BF16 or FP32 row is its own bytes. Parts of a message lie side by side in one row, so
that one all-to-all carries all of them; a message a part was refused, it pays the latency several times.

Legend: N rows, D model, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import E4M3, Fp8Tensor
from fp8moe.layers.operand import Rows

_MANTISSA_BITS = 23
_SIGN_AND_MANTISSA = -0x7F800001  # 0x807FFFFF as int32


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The parts along `dim`; a single one as it is, where `torch.cat` would copy it."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def as_bytes(rows: Tensor) -> Tensor:
    """[N, n] of any dtype -> [N, bytes] uint8."""
    return rows.reshape(-1).view(torch.uint8).view(len(rows), rows.shape[1] * rows.element_size())


def from_bytes(part: Tensor, dtype: torch.dtype) -> Tensor:
    """A column slice of bytes -> [N, n] of `dtype`: a view where its rows begin on multiples of a value's size."""
    size = dtype.itemsize
    if part.stride(1) == 1 and not (part.stride(0) % size or part.storage_offset() % size or part.shape[1] % size):
        return part.view(dtype)
    flat = part.reshape(-1)
    if flat.storage_offset() % dtype.itemsize:  # a slice of one row is a view, and may begin anywhere
        flat = flat.clone()
    return flat.view(dtype).view(len(part), part.shape[1] // dtype.itemsize)


def exponents(scale: Tensor) -> Tensor:
    """Power-of-two scales (FP32, normal, inf or NaN) -> uint8 of the same shape; ValueError for others (on a CPU)."""
    bits = scale.contiguous().view(torch.int32)
    nan = scale.isnan()
    if scale.device.type == "cpu" and bool(((bits & _SIGN_AND_MANTISSA != 0) & ~nan).any()):
        raise ValueError("scales that are sent must be powers of two, these are not: quantize with power_of_two=True")
    return (bits >> _MANTISSA_BITS).masked_fill(nan, 0).to(torch.uint8)


def scales(exponent: Tensor) -> Tensor:
    """The inverse of `exponents`."""
    scale = (exponent.to(torch.int32) << _MANTISSA_BITS).view(torch.float32)
    return scale.masked_fill(exponent == 0, float("nan"))


def pack(rows: Rows) -> Tensor:
    """[N, D] -> [N, bytes] uint8."""
    if isinstance(rows, Fp8Tensor):
        return torch.cat([as_bytes(rows.data), exponents(rows.scale)], dim=1)
    return as_bytes(rows)


def unpack(part: Tensor, like: Rows) -> Rows:
    """The inverse of `pack`, for rows of the kind and width of `like`."""
    if isinstance(like, Fp8Tensor):
        d = like.shape[1]
        return Fp8Tensor(from_bytes(part[:, :d], E4M3), scales(part[:, d:]))
    return from_bytes(part, like.dtype)


def row_bytes(rows: Rows) -> int:
    """Bytes of one packed row."""
    if isinstance(rows, Fp8Tensor):
        return rows.shape[1] + rows.scale.shape[1]
    return rows.shape[1] * rows.element_size()
