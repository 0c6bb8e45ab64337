"""Rows as bytes, where a message is put together by PyTorch: partial sums on the way back, and gathers.

What goes to experts is packed and unpacked by ops of its own (`kernels.message`), whose layout of FP8 rows `pack`
shares: codes, and one byte a scale. A BF16 or FP32 row is its own bytes.

Legend: N rows, D model, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.message_layout import as_bytes, exponents
from fp8moe.layers.operand import Rows

_BYTES = 16  # where columns begin: the widest access


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The parts along `dim`; a single one as it is, where `torch.cat` would copy it."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def split_rows(rows: Rows, sizes: list[int]) -> Sequence[Rows]:
    """Rows [N, D] -> pieces of that many rows, views."""
    if isinstance(rows, Tensor):
        return rows.split(sizes)
    return [Fp8Tensor(*parts) for parts in zip(rows.data.split(sizes), rows.scale.split(sizes), strict=True)]


@dataclass(frozen=True)
class Columns:
    """Tensors [N, n] that lie side by side in rows of bytes: the dtype and n of each."""

    kinds: tuple[tuple[torch.dtype, int], ...]

    def empty(self, rows: int, device: torch.device) -> Tensor:
        """An unfilled message of so many rows."""
        return torch.empty(rows, sum(self._sizes()), dtype=torch.uint8, device=device)

    def of(self, message: Tensor) -> list[Tensor]:
        """The columns of rows [N, bytes], views."""
        parts = message.split(self._sizes(), dim=1)
        return [part.view(dtype)[:, :n] for part, (dtype, n) in zip(parts, self.kinds, strict=True)]

    def _sizes(self) -> list[int]:
        return [-(-n * dtype.itemsize // _BYTES) * _BYTES for dtype, n in self.kinds]


def from_bytes(part: Tensor, dtype: torch.dtype) -> Tensor:
    """A column slice of bytes -> [N, n] of `dtype`: a view where its rows begin on multiples of a value's size."""
    size = dtype.itemsize
    if part.stride(1) == 1 and not (part.stride(0) % size or part.storage_offset() % size or part.shape[1] % size):
        return part.view(dtype)
    flat = part.reshape(-1)
    if flat.storage_offset() % dtype.itemsize:  # a slice of one row is a view, and may begin anywhere
        flat = flat.clone()
    return flat.view(dtype).view(len(part), part.shape[1] // dtype.itemsize)


def pack(rows: Rows) -> Tensor:
    """[N, D] -> [N, bytes] uint8."""
    if isinstance(rows, Fp8Tensor):
        return torch.cat([as_bytes(rows.data), exponents(rows.scale)], dim=1)
    return as_bytes(rows)


def row_bytes(rows: Rows) -> int:
    """Bytes of one packed row."""
    if isinstance(rows, Fp8Tensor):
        return rows.shape[1] + rows.scale.shape[1]
    return rows.shape[1] * rows.element_size()
