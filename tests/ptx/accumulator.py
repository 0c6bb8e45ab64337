"""The sum of an FP8 WGMMA as Hopper's tensor core keeps it: 13 fraction bits, truncated. A mode of the machine.

The machine's own sums are FP32's, so that a result can be compared to the bit with a specification. In this mode, which
`Machine.fraction_bits` turns on, they are those that `tests.kernels.tensor_core` describes, with the sources: products
and accumulator aligned to the largest exponent among them, cut off 13 bits below it, added, and the sum cut off to 13
bits. What is assumed: that this model, which others compared with an H100 bit by bit, is right; that NaN passes
through; that what is added to is such a sum, no number below 2^-32. BF16 products stay exact: they keep 25 bits.

FP32 is enough: aligned terms are whole numbers below 2^15 of one unit, and 33 of them add up without rounding.
"""

from __future__ import annotations

import numpy as np

LEAST_OF_E4M3, LEAST = -6, -32  # exponents: of a subnormal E4M3 number, and below every product of two


def exponents(values: np.ndarray, least: int) -> np.ndarray:
    """The exponent of each number as int16, at least `least`; far less for a zero."""
    bits = values.view(np.uint32)
    found = np.maximum(((bits >> np.uint32(23)) & np.uint32(0xFF)).astype(np.int16) - np.int16(127), np.int16(least))
    return np.where(values == 0, np.int16(-999), found)


def power_of_two(exponent: np.ndarray) -> np.ndarray:
    """2^exponent in FP32, exponents of ordinary numbers."""
    return ((exponent.astype(np.int32) + 127) << 23).view(np.float32)


def truncated_sum(left: np.ndarray, right: np.ndarray, start: np.ndarray | None, fraction_bits: int) -> np.ndarray:
    """start [m, n] + left [m, k] @ right [n, k]^T, FP32, of E4M3 values and one WGMMA's k; start may be missing."""
    rows, columns = np.ascontiguousarray(left.T)[:, :, None], np.ascontiguousarray(right.T)[:, None, :]
    of_rows, of_columns = exponents(rows, LEAST_OF_E4M3), exponents(columns, LEAST_OF_E4M3)
    largest = np.full((len(left), len(right)), LEAST, np.int16)
    for i, j in zip(of_rows, of_columns, strict=True):
        np.maximum(largest, i + j, out=largest)
    if start is not None:
        np.maximum(largest, exponents(start, LEAST), out=largest)
    units = power_of_two(fraction_bits - largest)
    total = np.zeros(largest.shape, np.float32) if start is None else np.trunc(start * units)
    term = np.empty_like(total)
    for i, j in zip(rows, columns, strict=True):
        np.multiply(i, j, out=term)
        np.multiply(term, units, out=term)
        total += np.trunc(term, out=term)
    total *= power_of_two(largest - fraction_bits)
    return (total.view(np.uint32) & np.uint32(0xFFFFFFFF << (23 - fraction_bits) & 0xFFFFFFFF)).view(np.float32)
