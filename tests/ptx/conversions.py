"""`cvt`: roundings between integers, FP32, BF16, FP16 and E4M3, written from the definitions of the formats.

FP32 to a narrower float is done on integers: to nearest, ties to even, by adding half of what is dropped less one plus
the last bit kept. E4M3 is `satfinite`: beyond 448 it is 448, a NaN is 0x7F. `test_machine` compares each with PyTorch's
casts over every case that matters.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.ptx.parser import Unsupported

BF16_NAN = 0x7FFF


def bf16_of(x: np.ndarray) -> np.ndarray:
    """FP32 -> the bits of BF16, to nearest even."""
    bits = x.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(nan, np.uint32(BF16_NAN), rounded).astype(np.uint16)


def f32_of_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def e4m3_of(x: np.ndarray) -> np.ndarray:
    """FP32 -> the bits of E4M3 (bias 7, no infinity), to nearest even, saturating at 448."""
    bits = x.view(np.uint32)
    sign = ((bits >> np.uint32(24)) & np.uint32(0x80)).astype(np.uint8)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    # A normal keeps 3 of 23 bits of mantissa; its exponent is rebiased from 127 to 7.
    normal = (magnitude + (np.uint32(0x7FFFF) + ((magnitude >> np.uint32(20)) & np.uint32(1)))) >> np.uint32(20)
    normal = normal.astype(np.int32) - (120 << 3)
    # Below 2^-6 the step is 2^-9: a whole number of steps, rounded to even.
    steps = np.rint(np.fmin(magnitude.view(np.float32), np.float32(1)).astype(np.float64) * 512).astype(np.int32)
    code = np.where(magnitude < np.uint32(0x3C800000), steps, np.minimum(normal, 0x7E))
    return np.where(magnitude > np.uint32(0x7F800000), np.uint8(0x7F), code.astype(np.uint8) | sign)


def half_of_e4m3(codes: np.ndarray) -> np.ndarray:
    """E4M3 -> FP16, exactly."""
    codes = codes.astype(np.uint16)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent.astype(np.float64) - 10))
    value = np.where((codes & 0x7F) == 0x7F, np.nan, value)
    return np.where(codes & 0x80, -value, value).astype(np.float16)


E4M3_VALUES = half_of_e4m3(np.arange(256)).astype(np.float32)
# Two codes behind one another -> two FP32 numbers, as one of 8 bytes: half as many look-ups.
_PAIRS = np.stack(np.broadcast_arrays(E4M3_VALUES, E4M3_VALUES[:, None]), -1)
E4M3_PAIRS = _PAIRS.reshape(-1).view(np.complex64)


def _pair(high: np.ndarray, low: np.ndarray, bits: int) -> np.ndarray:
    dtype = {8: np.uint16, 16: np.uint32}[bits]
    return (high.astype(dtype) << dtype(bits)) | low.astype(dtype)


def bf16_pair(name: str, parts: list[str]) -> Any:
    """Arithmetic on BF16 or pairs of it: FP32 has more than twice the bits, so that rounding its result rounds once."""
    table, kind = {"add": np.add, "sub": np.subtract, "mul": np.multiply}, parts[-1]
    if "NaN" in parts:
        table = {"min": np.minimum, "max": np.maximum}
    if name not in table:
        raise Unsupported(f"{'.'.join(parts)} is not known")

    def one(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return bf16_of(table[name](f32_of_bf16(a), f32_of_bf16(b)))

    if kind == "bf16":
        return one
    low, high = np.uint32(0xFFFF), np.uint32(16)
    return lambda a, b: _pair(one(a >> high, b >> high), one(a & low, b & low), 16)


def convert(parts: list[str]) -> tuple[Any, list[Any]]:
    """(a function of the sources, their dtypes) for the opcode `parts`."""
    to, source = parts[-2], parts[-1]
    key = f"{to}.{source}"
    f32, u16, half = np.float32, np.uint16, np.float16
    if to in ("e4m3x2", "bf16x2", "bf16", "f16x2", "f16") and source == "f32" and "rn" not in parts:
        raise Unsupported(f"{'.'.join(parts)}: only rounding to nearest even is known")
    special = {
        "e4m3x2.f32": (lambda a, b: _pair(e4m3_of(a), e4m3_of(b), 8), [f32, f32]),
        "bf16x2.f32": (lambda a, b: _pair(bf16_of(a), bf16_of(b), 16), [f32, f32]),
        "bf16.f32": (bf16_of, [f32]),
        "f32.bf16": (f32_of_bf16, [u16]),
        "f16x2.f32": (lambda a, b: _pair(a.astype(half).view(u16), b.astype(half).view(u16), 16), [f32, f32]),
        "f16.f32": (lambda a: a.astype(half), [f32]),
        "f32.f16": (lambda a: a.astype(f32), [half]),
        "f16x2.e4m3x2": (
            lambda a: _pair(half_of_e4m3(a >> u16(8)).view(u16), half_of_e4m3(a & u16(255)).view(u16), 16),
            [u16],
        ),
    }
    if key in special:
        return special[key]
    to_dtype, source_dtype = dtype_of(to), dtype_of(source)
    if np.issubdtype(to_dtype, np.floating) or np.issubdtype(source_dtype, np.floating):
        return _number(parts, to_dtype, source_dtype), [source_dtype]
    return (lambda a: a.astype(to_dtype)), [source_dtype]


def _number(parts: list[str], to: Any, source: Any) -> Any:
    """Between a float and an integer, or two widths of float."""
    if np.issubdtype(to, np.floating):
        return lambda a: a.astype(to)
    if "rzi" not in parts:
        raise Unsupported(f"{'.'.join(parts)}: only rounding towards zero is known")
    limits = np.iinfo(to)
    return lambda a: np.clip(np.nan_to_num(np.trunc(a.astype(np.float64))), limits.min, limits.max).astype(to)


def dtype_of(kind: str) -> Any:
    """The NumPy type of `s32`, `b64`, `f32` and so on."""
    letter, bits = kind[0], kind[1:]
    tables = {
        "s": {"8": np.int8, "16": np.int16, "32": np.int32, "64": np.int64},
        "u": {"8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64},
        "b": {"8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64},
        "f": {"16": np.float16, "32": np.float32, "64": np.float64},
    }
    if letter not in tables or bits not in tables[letter]:
        raise Unsupported(f"type .{kind} is not known")
    return tables[letter][bits]
