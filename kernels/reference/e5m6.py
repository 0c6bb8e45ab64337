"""E5M6: rounding to 12 bits on the bits of FP32, and packing as arithmetic on the bits of 96-bit runs."""

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import (
    ACTIVATION_AMAX_FLOOR,
    E5M6_MAX,
    E5M6_VALUES,
    E5M6_WORDS,
    E5m6Tensor,
    Fp8Tensor,
    multiply_tiles,
)
from fp8moe.kernels.reference._encode import magnitude_bits, scale_of, tile_amax
from fp8moe.kernels.reference.quantize import quantize_columns

_BITS = 12
_DROPPED = 17  # mantissa bits of FP32 beyond E5M6's six
_SMALLEST_NORMAL = 2.0**-14
_ROUNDS_SUBNORMALS = 12.0  # 1.5 x 2^23 x the subnormal step 2^-20: a number whose own last place is that step


def pack_e5m6(x: Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR) -> E5m6Tensor:
    scale = scale_of(tile_amax(magnitude_bits(x), -1), amax_floor, True, E5M6_MAX)
    values = x.to(torch.float32, copy=True)
    multiply_tiles(values, scale.reciprocal(), values)
    codes = _codes(values.clamp_(-E5M6_MAX, E5M6_MAX))
    run = codes.unflatten(-1, (-1, E5M6_VALUES))
    words = run.new_zeros(*run.shape[:-1], E5M6_WORDS)
    for j, first, word in _places():
        shifted = run[..., j] << first if first >= 0 else run[..., j] >> -first
        words[..., word] |= shifted & 0xFFFFFFFF
    return E5m6Tensor(words.flatten(-2).to(torch.int32), scale)


def unpack_e5m6(packed: E5m6Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    words = packed.data.unflatten(-1, (-1, E5M6_WORDS)).to(torch.int64) & 0xFFFFFFFF
    codes = words.new_zeros(*words.shape[:-1], E5M6_VALUES)
    for j, first, word in _places():
        codes[..., j] |= words[..., word] >> first if first >= 0 else words[..., word] << -first
    half = ((codes & 0xFFF) << 4).flatten(-2)
    values = torch.where(half >= 0x8000, half - 0x10000, half).to(torch.int16).view(torch.float16).float()
    return multiply_tiles(values, packed.scale, values).to(dtype)


def e5m6_to_columns(packed: E5m6Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR) -> Fp8Tensor:
    return quantize_columns(unpack_e5m6(packed, dtype=torch.float32), amax_floor=amax_floor, power_of_two=True)


def _codes(values: Tensor) -> Tensor:
    """FP32 within +-65024 -> 12-bit codes as int64, rounded to nearest even."""
    bits = values.abs().view(torch.int32)
    normal = (bits + (1 << (_DROPPED - 1)) - 1 + ((bits >> _DROPPED) & 1)) & -(1 << _DROPPED)
    subnormal = (values.abs() + _ROUNDS_SUBNORMALS) - _ROUNDS_SUBNORMALS
    rounded = torch.where(values.abs() < _SMALLEST_NORMAL, subnormal, normal.view(torch.float32))
    half = rounded.copysign(values).half()  # exact
    return ((half.view(torch.int16).to(torch.int64) & 0xFFFF) >> 4).contiguous()


def _places() -> list[tuple[int, int, int]]:
    """(j, shift, word): value j of a run lies in `word` from bit `shift` on, negative where it began in the last."""
    places = []
    for j in range(E5M6_VALUES):
        for word in range(E5M6_WORDS):
            shift = j * _BITS - word * 32
            if -_BITS < shift < 32:
                places.append((j, shift, word))
    return places
