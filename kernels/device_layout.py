"""Where Triton's casts and rotations put their results, and whether a cache holds latents, without importing Triton:
tracing on any machine asks here.

Codes are contiguous in the orientation a tensor core reads, columns included: the transpose is physical. Scales of
1x128 tiles are M-major, stride 1 along M, as a GEMM loads them; gathering rows for the wire makes them token-major.
"""

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import BLOCK_TILE, E4M3, TILE, Fp8Tensor, scale_shape


def empty_rows(m: int, k: int, device: torch.device) -> Fp8Tensor:
    """An unfilled [M, K] of 1x128 tiles."""
    return Fp8Tensor.of(torch.empty(m, k, dtype=E4M3, device=device), empty_scales(m, k, device))


def empty_columns(m: int, k: int, device: torch.device) -> Fp8Tensor:
    """The unfilled columns [K, M] of an x [M, K]."""
    return empty_rows(k, m, device)


def empty_blocks(shape: tuple[int, ...], device: torch.device) -> Fp8Tensor:
    """An unfilled [..., N, K] of 128x128 blocks."""
    scale = torch.empty(scale_shape(shape, BLOCK_TILE), dtype=torch.float32, device=device)
    return Fp8Tensor(torch.empty(shape, dtype=E4M3, device=device), scale, BLOCK_TILE)


def empty_scales(m: int, k: int, device: torch.device) -> Tensor:
    """Unfilled scales [M, ceil(K/128)] at stride 1 along M."""
    return torch.empty_strided((m, -(-k // TILE)), (1, max(m, 1)), dtype=torch.float32, device=device)


def empty_keys(kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, *, nope_dim: int) -> list[Tensor]:
    """The unfilled keys [T, H, nope + rope] of `rope_keys`, given its arguments."""
    return [kv.new_empty(*kv.shape[:2], nope_dim + 2 * cos.shape[1])]


def empty_keys_gradient(dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """The unfilled d kv [T, H, nope + v] and d k_rope [T, rope] of `rope_keys_backward`, given its arguments."""
    rope = 2 * cos.shape[1]
    return [dk.new_empty(*dk.shape[:2], dk.shape[2] - rope + dv.shape[2]), dk.new_empty(dk.shape[0], rope)]


def are_latents(keys: Tensor, values: Tensor) -> bool:
    """Whether values are the first features of the keys, which one head of keys has."""
    lie = values.data_ptr() == keys.data_ptr() and values.stride() == keys.stride()
    return lie and keys.shape[2] == 1 and values.shape[-1] < keys.shape[-1]
