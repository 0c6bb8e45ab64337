"""The block-scaled FP8 tensor: codes, scales, and which tile a scale covers.

Numerics: every FP8 tensor of the project is E4M3 (``float8_e4m3fn``, largest value 448), gradients included; a
dequantized value is code x scale. Activations and gradients carry one FP32 scale for 1x128 values along the
contraction, weights one for a 128x128 block. Sizes need not be multiples of 128: the last tile is short and its scale
describes what is there.

Layout: the *logical* shape is what the specification fixes. The scale of 1x128 tiles may lie token-major (contiguous:
the form that travels) or M-major (stride 1 along M: the form a GEMM loads). A "columns" tensor is no new kind: it is
the `Fp8Tensor` of the transposed matrix. The reference back end keeps its codes as a transposed view (a CPU GEMM reads
either orientation, and a byte-wise transpose would cost as much as the cast); a back end whose tensor cores take
K-major bytes only asks for `.contiguous()` data.

Decoding goes through FP16: shifting the seven low bits of a code into the FP16 exponent and mantissa gives exactly
code x 2^-8, subnormals included, in three cheap integer passes. The obvious ``data.float()`` is ten times slower on a
CPU; the same shift into BF16 was refused because subnormal codes become BF16 subnormals there, which AMX flushes to
zero. The NaN code decodes to a finite number; that is safe because a tile with a non-finite value has a non-finite
scale, which every product carries on.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TILE = 128
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
ACTIVATION_AMAX_FLOOR = 1e-4
GRADIENT_AMAX_FLOOR = 1e-30
LEAST_AMAX_FLOOR = {"E4M3": 1e-30, "E5M6": 1e-29}  # below them a step of the format under its scale leaves FP32
ROW_TILE = (1, TILE)
BLOCK_TILE = (TILE, TILE)
DECODE_GAIN = 256.0  # half_codes() is code / DECODE_GAIN
SIZE_MULTIPLE = 16

_SHIFT = 7  # from E4M3's seven low bits to FP16's exponent and top mantissa bits
_FP16_SIGN_AND_CODE = -0x4080  # 0xBF80 as int16: drops the second copy of the sign that the shift leaves


def ceil_div(a: int, b: int) -> int:
    """Tiles of `b` that cover `a`."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, a positive number; Triton's own costs the host microseconds."""
    return 1 << (n - 1).bit_length()


def scale_shape(shape: tuple[int, ...] | torch.Size, tile: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a [..., M, K] tensor: [..., ceil(M / tile[0]), ceil(K / tile[1])]."""
    *lead, m, k = shape
    return (*lead, -(-m // tile[0]), -(-k // tile[1]))


def half_codes(data: Tensor) -> Tensor:
    """Codes as FP16, divided by DECODE_GAIN, exactly. Strides are kept."""
    bits = data.view(torch.int8).to(torch.int16)
    bits <<= _SHIFT
    bits &= _FP16_SIGN_AND_CODE
    return bits.view(torch.float16)


def multiply_tiles(values: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """out = values [..., K] x factor [..., ceil(K/128)], one factor for each 128 along the last dim; returns out.

    `out` may be `values` itself.
    """
    full = values.shape[-1] // TILE * TILE
    if full:
        split = (full // TILE, TILE)
        head, target = values[..., :full].unflatten(-1, split), out[..., :full].unflatten(-1, split)
        torch.mul(head, factor[..., : full // TILE, None], out=target)
    if full < values.shape[-1]:
        torch.mul(values[..., full:], factor[..., -1:], out=out[..., full:])
    return out


def decode(data: Tensor, scale: Tensor) -> Tensor:
    """code x scale in FP32 for 1x128 tiles: data [..., M, K], scale [..., M, ceil(K/128)]; strides as data has them."""
    values = half_codes(data).float()
    return multiply_tiles(values, scale * DECODE_GAIN, values)


@dataclass(frozen=True)
class Fp8Tensor:
    """An E4M3 tensor with its scales.

    data: float8_e4m3fn [..., M, K]. scale: float32, [..., M, ceil(K/128)] for tile (1, 128) and
    [..., ceil(M/128), ceil(K/128)] for tile (128, 128). Neither needs to be contiguous.
    """

    data: Tensor
    scale: Tensor
    tile: tuple[int, int] = ROW_TILE

    def __post_init__(self) -> None:
        data, scale = self.data, self.scale
        assert data.dtype is E4M3 and scale.dtype is torch.float32, (data.dtype, scale.dtype)
        expected = scale_shape(data.shape, self.tile)
        assert scale.shape == expected, f"scale is {tuple(scale.shape)}, tile {self.tile} asks for {expected}"

    @classmethod
    def of(cls, data: Tensor, scale: Tensor, tile: tuple[int, int] = ROW_TILE) -> "Fp8Tensor":
        """The same without checks, for who has just allocated both parts: an op makes several, and they take longer."""
        made = object.__new__(cls)
        made.__dict__.update(data=data, scale=scale, tile=tile)
        return made

    @property
    def shape(self) -> torch.Size:
        """Logical shape [..., M, K]."""
        return self.data.shape

    @property
    def device(self) -> torch.device:
        """Where the codes lie."""
        return self.data.device

    @property
    def scale_layout(self) -> Literal["token_major", "m_major"]:
        """ "token_major" where the scales of one row lie together, "m_major" where those of one K tile do."""
        return "token_major" if self.scale.is_contiguous() else "m_major"

    def to_m_major(self) -> "Fp8Tensor":
        """The same tensor with scales at stride 1 along M, as a GEMM loads them."""
        return Fp8Tensor(self.data, self.scale.mT.contiguous().mT, self.tile)

    def index_rows(self, index: Tensor) -> "Fp8Tensor":
        """Rows `index` (int64 [R], none negative) of a [M, K] tensor of 1x128 tiles."""
        if self.tile != ROW_TILE:
            raise ValueError(f"rows can be taken from tile {ROW_TILE} only, this tensor has {self.tile}: dequantize it")
        rows = self.data.view(torch.uint8).index_select(0, index).view(E4M3)
        return Fp8Tensor(rows, self.scale.index_select(0, index), self.tile)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """code x scale, multiplied in FP32 and rounded to `dtype`; [..., M, K], strides as the codes have them."""
        scale = self.scale
        if self.tile == BLOCK_TILE:
            scale = scale.repeat_interleave(TILE, dim=-2)[..., : self.data.shape[-2], :]
        return decode(self.data, scale).to(dtype)


E5M6_MAX = 65024.0
E5M6_WORDS = 3  # words of 32 bits that hold
E5M6_VALUES = 8  # this many values of 12 bits


Rows = Tensor | Fp8Tensor  # a matrix as it is multiplied, sent or permuted: unquantized, or FP8 with its scales


@dataclass(frozen=True)
class E5m6Tensor:
    """A tensor of 12-bit floats with five exponent and six mantissa bits, by 1x128 tiles; see `e5m6`.

    data: int32 [..., M, 3 K / 8], the bits of unsigned words. scale: float32 [..., M, ceil(K/128)], powers of two.
    """

    data: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        assert self.data.dtype is torch.int32 and self.scale.dtype is torch.float32, (self.data.dtype, self.scale.dtype)
        assert self.data.shape[-1] % E5M6_WORDS == 0 and self.scale.shape == scale_shape(self.shape, ROW_TILE), (
            f"{tuple(self.data.shape)} words with scales {tuple(self.scale.shape)}"
        )

    @property
    def shape(self) -> torch.Size:
        """Logical shape [..., M, K]."""
        return torch.Size((*self.data.shape[:-1], self.data.shape[-1] // E5M6_WORDS * E5M6_VALUES))

    @property
    def device(self) -> torch.device:
        """Where the words lie."""
        return self.data.device


def check_sizes(**sizes: int) -> None:
    """Raise ValueError unless every named size is a multiple of 16: rows of FP8 must start on 16 bytes."""
    for name, size in sizes.items():
        if size % SIZE_MULTIPLE:
            nearest = max(SIZE_MULTIPLE, round(size / SIZE_MULTIPLE) * SIZE_MULTIPLE)
            raise ValueError(f"{name}={size} must be a multiple of {SIZE_MULTIPLE}, which FP8 needs: use {nearest}")


def check_floor(amax_floor: float, kind: str = "E4M3") -> None:
    """Raise ValueError for a floor so small that numbers under its scale would not be FP32's normal ones."""
    if not amax_floor >= LEAST_AMAX_FLOOR[kind]:
        raise ValueError(f"amax_floor={amax_floor:g} must be at least {LEAST_AMAX_FLOOR[kind]:g} for {kind}: use that")


def check_limit(limit: float | None) -> None:
    """Raise ValueError for a clamp of SwiGLU that is none."""
    if limit is not None and not 0 < limit < float("inf"):
        raise ValueError(f"limit={limit} must be above 0 and finite: use 7.0, or None for plain SwiGLU")


def check_groups(group_offsets: Tensor, num_groups: int, num_rows: int, align: int) -> None:
    """Raise ValueError unless offsets are int32 [E+1], and, where they can be read for free (CPU), ascend from 0."""
    if group_offsets.dtype is not torch.int32 or group_offsets.shape != (num_groups + 1,):
        raise ValueError(
            f"group_offsets of {num_groups} groups must be int32 [{num_groups + 1}], got {group_offsets.dtype} "
            f"{list(group_offsets.shape)}: use RowMap.group_offsets"
        )
    if torch.compiler.is_compiling() or type(group_offsets) is not Tensor or group_offsets.device.type != "cpu":
        return
    offsets = group_offsets.tolist()
    if offsets[0] != 0 or offsets[-1] > num_rows or any(a > b for a, b in itertools.pairwise(offsets)):
        raise ValueError(f"group_offsets must ascend from 0 to at most {num_rows} rows, got {offsets}: sort the rows")
    if any(offset % align for offset in offsets):
        raise ValueError(f"group_offsets must be multiples of {align} rows for FP8, got {offsets}: pad each group")


def check_total(total: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `total`, which a product is added into, is FP32 of `shape`."""
    if total.dtype is not torch.float32 or total.shape != shape:
        raise ValueError(
            f"a product {list(shape)} is added into FP32 of its shape, not {total.dtype} {list(total.shape)}: "
            "allocate main_grad so"
        )
