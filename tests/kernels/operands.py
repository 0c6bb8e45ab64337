"""An E4M3 quantizer in NumPy that shares no code with the project's, and what tests ask of a quantized tensor."""

import numpy as np
import torch
from torch import Tensor

from fp8moe.kernels.fp8 import Fp8Tensor


def e4m3_values() -> np.ndarray:
    """The value of each positive finite code 0..126, from the definition: bias 7, subnormals at exponent 0."""
    code = np.arange(127)
    exponent, mantissa = code >> 3, code & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))


def quantize_tile(x: np.ndarray, floor: float, power_of_two: bool) -> tuple[np.ndarray, np.float32]:
    """(codes as uint8, scale) of one tile of FP32 values, by the formula; ties to the even code."""
    amax = np.maximum(np.abs(x).max(), np.float32(floor))
    scale = np.float32(amax) / np.float32(448)
    if power_of_two:
        mantissa, exponent = np.frexp(np.float64(scale))
        scale = np.float32(2.0 ** (exponent - (mantissa == 0.5)))
    y = np.clip(x * (np.float32(1) / scale), np.float32(-448), np.float32(448))
    values = e4m3_values()
    magnitude = np.abs(y).astype(np.float64)
    low = np.searchsorted(values, magnitude, side="right") - 1
    high = np.minimum(low + 1, 126)
    below, above = magnitude - values[low], values[high] - magnitude
    up = (above < below) | ((above == below) & (low % 2 == 1))
    return (np.where(up, high, low) | np.where(np.signbit(y), 128, 0)).astype(np.uint8), scale


def quantize_matrix(x: Tensor, tile: tuple[int, int], floor: float, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """(codes uint8 [M, K], scale [ceil(M / tile[0]), ceil(K / tile[1])]), tile by tile."""
    source = x.float().numpy()
    m, k = source.shape
    codes = np.zeros((m, k), dtype=np.uint8)
    scale = np.zeros((-(-m // tile[0]), -(-k // tile[1])), dtype=np.float32)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            where = np.s_[i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]]
            codes[where], scale[i, j] = quantize_tile(source[where], floor, power_of_two)
    return torch.from_numpy(codes), torch.from_numpy(scale)


def codes(q: Fp8Tensor) -> Tensor:
    """The bytes of an FP8 tensor."""
    return q.data.view(torch.uint8)


def assert_rounded(q: Fp8Tensor, exact: Tensor) -> None:
    """`q` is `exact` rounded once: within half a step of E4M3, or of its subnormals, at the tile's scale."""
    scale = q.scale.double()
    for dim, size in ((-2, q.tile[0]), (-1, q.tile[1])):
        scale = scale.repeat_interleave(size, dim=dim).narrow(dim, 0, q.shape[dim])
    error = (q.dequantize().double() - exact.double()).abs()
    bound = torch.maximum(exact.double().abs() * 2.0**-4, scale * 2.0**-10)
    assert bool((error <= bound * (1 + 1e-4)).all()), float((error / bound).max())
