"""E5M6: rounding on the bits of FP32; packing on four values at a time, as one integer of 64 bits that shrinks to 48.

The specification counts bits from the lowest up, so 48 bits of four values and 48 of the next four are the 96 of a run
as long as the machine is little-endian, which every machine of PyTorch's is.
"""

import torch
from torch import Tensor, nn

from fp8moe.kernels.fp8 import (
    ACTIVATION_AMAX_FLOOR,
    E5M6_MAX,
    E5m6Tensor,
    Fp8Tensor,
    multiply_tiles,
)
from fp8moe.kernels.reference._arithmetic import magnitude_bits, scale_of, tile_amax
from fp8moe.kernels.reference.quantize import quantize_columns

_MASKS = tuple(0xFFF << 12 * lane for lane in range(4))  # of the first four values of a run, packed
_DROPPED = 17  # mantissa bits of FP32 beyond E5M6's six
_SMALLEST_NORMAL = 2.0**-14
_ROUNDS_SUBNORMALS = 12.0  # 1.5 x 2^23 x the subnormal step 2^-20: a number whose own last place is that step


def pack_e5m6(x: Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR) -> E5m6Tensor:
    scale = scale_of(tile_amax(magnitude_bits(x), -1), amax_floor, True, E5M6_MAX)
    values = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    multiply_tiles(values, scale.reciprocal(), values)
    four = _halves(values.clamp_(-E5M6_MAX, E5M6_MAX)).view(torch.int64)
    packed = torch.zeros_like(four)
    for lane, mask in enumerate(_MASKS):
        packed |= (four >> 4 * (lane + 1)) & mask
    return E5m6Tensor(packed.view(torch.int16).unflatten(-1, (-1, 4))[..., :3].flatten(-2).view(torch.int32), scale)


def unpack_e5m6(packed: E5m6Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    words = packed.data.contiguous().view(torch.int16).unflatten(-1, (-1, 3))
    four = nn.functional.pad(words, (0, 1)).flatten(-2).view(torch.int64)
    halves = torch.zeros_like(four)
    for lane, mask in enumerate(_MASKS):
        halves |= (four & mask) << 4 * (lane + 1)
    values = halves.view(torch.float16).float()
    return multiply_tiles(values, packed.scale, values).to(dtype)


def e5m6_to_columns(packed: E5m6Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR) -> Fp8Tensor:
    return quantize_columns(unpack_e5m6(packed, dtype=torch.float32), amax_floor=amax_floor, power_of_two=True)


def _halves(values: Tensor) -> Tensor:
    """FP32 within +-65024, contiguous, rounded to nearest even of the format, as FP16 (whose last four bits are 0)."""
    magnitude = values.abs()
    bits = magnitude.view(torch.int32)
    normal = (bits + (1 << (_DROPPED - 1)) - 1 + ((bits >> _DROPPED) & 1)) & -(1 << _DROPPED)
    subnormal = (magnitude + _ROUNDS_SUBNORMALS) - _ROUNDS_SUBNORMALS
    rounded = torch.where(magnitude < _SMALLEST_NORMAL, subnormal, normal.view(torch.float32))
    return rounded.copysign_(values).half()
