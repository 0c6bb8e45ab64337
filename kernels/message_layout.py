"""Bytes of one row of a message between ranks.

It stands apart from the ops of `message` because their implementations and their registration name it too.

    body | weights | ids | sender | exponents | padding

The body is a row's codes or values. With ids travel their routing weights (FP32) and the rank that the row started
from. Ids (int16) are inverted, so that a row of zeros, which a message of fixed size has left over, holds experts that
are not there. FP8 rows end with one byte a scale: scales that are sent are powers of two, and a power of two is its
exponent (the byte of the FP32 format, never 0 because casts keep scales normal; 0 is free and stands for NaN, so that a
gradient that is not finite arrives so). Rows are padded to 16 bytes, the widest access.

Legend: N rows, D values of a row, K top-k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import E4M3, TILE, Fp8Tensor, Rows, ceil_div

WEIGHT, ID = 4, 2  # bytes
ROW_MULTIPLE = 16  # bytes
MOST_EXPERTS = 2**15
MANTISSA_BITS = 23  # of FP32
_SIGN_AND_MANTISSA = -0x7F800001  # 0x807FFFFF as int32


@dataclass(frozen=True)
class MessageLayout:
    """Where the parts of a row lie: `weights`, `ids`, `sender` and `exponents` count bytes from its start.

    dtype: of the values, E4M3 for FP8 rows. width: D. topk: K, 0 where neither ids nor weights travel.
    """

    dtype: torch.dtype
    width: int
    topk: int

    @classmethod
    def of(cls, rows: Rows, topk: int = 0) -> "MessageLayout":
        """The layout for rows like these."""
        return cls(E4M3 if isinstance(rows, Fp8Tensor) else rows.dtype, rows.shape[1], topk)

    @property
    def fp8(self) -> bool:
        """Whether rows have scales."""
        return self.dtype is E4M3

    @property
    def body(self) -> int:
        """Bytes of the body."""
        return self.width * self.dtype.itemsize

    @property
    def weights(self) -> int:
        return ceil_div(self.body, WEIGHT) * WEIGHT

    @property
    def ids(self) -> int:
        return self.weights + WEIGHT * self.topk

    @property
    def sender(self) -> int:
        return self.ids + ID * self.topk

    @property
    def exponents(self) -> int:
        return self.sender + (ID if self.topk else 0)

    @property
    def num_tiles(self) -> int:
        """Scales of a row."""
        return ceil_div(self.width, TILE) if self.fp8 else 0

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return ceil_div(self.exponents + self.num_tiles, ROW_MULTIPLE) * ROW_MULTIPLE

    def ids_of(self, message: Tensor) -> Tensor:
        """The ids in rows [N, bytes], a view: int16 [N, K], inverted, as plans read them."""
        return message.view(torch.int16)[:, self.ids // ID : self.sender // ID]

    def sender_of(self, message: Tensor) -> Tensor:
        """The rank each row started from, a view: int16 [N, 1], inverted."""
        return message.view(torch.int16)[:, self.sender // ID : self.sender // ID + 1]


def exponents(scale: Tensor) -> Tensor:
    """Power-of-two scales (FP32, normal, inf or NaN) -> uint8 of the same shape; ValueError for others (on a CPU)."""
    bits = scale.contiguous().view(torch.int32)
    nan = scale.isnan()
    if scale.device.type == "cpu" and bool(((bits & _SIGN_AND_MANTISSA != 0) & ~nan).any()):
        raise ValueError("scales that are sent must be powers of two, these are not: quantize with power_of_two=True")
    return (bits >> MANTISSA_BITS).masked_fill(nan, 0).to(torch.uint8)


def scales(exponent: Tensor) -> Tensor:
    """The inverse of `exponents`."""
    scale = (exponent.to(torch.int32) << MANTISSA_BITS).view(torch.float32)
    return scale.masked_fill(exponent == 0, float("nan"))


def as_bytes(rows: Tensor) -> Tensor:
    """[N, n] of any dtype -> [N, bytes] uint8."""
    return rows.contiguous().view(-1).view(torch.uint8).view(len(rows), rows.shape[1] * rows.element_size())
