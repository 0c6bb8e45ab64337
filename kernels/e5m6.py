"""E5M6, the 12-bit format in which the input of the Linear after attention is kept for its weight gradient.

Numerics: one sign, five exponent and six mantissa bits: FP16 without its last four mantissa bits, largest value 65024.
Each 1x128 tile has a scale, a power of two: max(amax, floor) / 65024 rounded up, so that the attention's output, which
backward of attention needs too, keeps three more mantissa bits than E4M3 would leave it (DeepSeek-V3 report, section
3.3.3). BF16 was refused for its 16 bits, E4M3 because attention's backward is sensitive to it.

Layout: value j of a run of 8 has bits [12 j, 12 j + 12) of 96, kept in 3 words from the lowest bit up; words lie along
the last dim like the values they hold. They are stored as int32 because PyTorch computes little in uint32.
"""

import torch
from torch import Tensor

from fp8moe.kernels import backend
from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR, E5m6Tensor, Fp8Tensor, check_floor, check_sizes


def pack_e5m6(x: Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR) -> E5m6Tensor:
    """x [..., K] BF16 or FP32, K a multiple of 16 -> 12-bit values with a power-of-two scale for each 128 along K.

    Raises ValueError for another dtype, fewer than two dims, another K, or an amax_floor below 1e-29.
    """
    if x.dtype not in (torch.bfloat16, torch.float32) or x.dim() < 2:
        raise ValueError(f"pack_e5m6 takes BF16 or FP32 [..., K], got {x.dtype} {list(x.shape)}: cast or reshape it")
    check_sizes(K=x.shape[-1])
    check_floor(amax_floor, "E5M6")
    return backend.op("pack_e5m6")(x, amax_floor=amax_floor)


def unpack_e5m6(packed: E5m6Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The values [..., K] in BF16 or FP32; FP32 is exact. Raises ValueError for another dtype."""
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"unpack_e5m6 writes torch.bfloat16 or torch.float32, got {dtype}: cast afterwards")
    return backend.op("unpack_e5m6")(packed, dtype=dtype)


def e5m6_to_columns(packed: E5m6Tensor, *, amax_floor: float = ACTIVATION_AMAX_FLOOR) -> Fp8Tensor:
    """packed [M, K] -> FP8 columns [K, M] with power-of-two scales, for Wgrad; M a multiple of 16.

    Raises ValueError for more than two dims, another M, or an amax_floor below 1e-30.
    """
    if len(packed.shape) != 2:
        raise ValueError(f"columns are quantized from a matrix, got {len(packed.shape)} dims: flatten it before")
    check_sizes(M=packed.shape[0])
    check_floor(amax_floor)
    return backend.op("e5m6_to_columns")(packed, amax_floor=amax_floor)
