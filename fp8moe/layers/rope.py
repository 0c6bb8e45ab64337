"""Rotary position embedding of interleaved pairs, with YaRN's blend of frequencies.

Features (2i, 2i+1) are rotated by position x frequency_i. The rotated pairs are stored apart, all first members before
all second ones, as the released checkpoints' reference does: queries and keys are permuted alike, so scores don't
change. YaRN (arXiv 2309.00071, section 3.2) leaves frequencies with many rotations inside the original context alone,
interpolates those with few by 1/s, and ramps between.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def inverse_frequencies(dim: int, theta: float) -> Tensor:
    """theta^(-2i/dim) for each of the dim/2 pairs, FP32 [dim/2]."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def yarn_frequencies(
    dim: int, theta: float, *, factor: float, original: int, beta_slow: float, beta_fast: float
) -> Tensor:
    """Inverse frequencies for a context `factor` times the `original` length (tokens), FP32 [dim/2].

    A pair that turns `beta_fast` times or more within the original context keeps its frequency, one that turns
    `beta_slow` times or less is slowed by `factor`; between, a linear ramp over the pair's index.
    """

    def pair_that_turns(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(beta_slow)), dim - 1)
    width = max(last - first, 1e-3)  # both ends on one pair: a step instead of a ramp
    slowed = ((torch.arange(dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    kept = inverse_frequencies(dim, theta)
    return kept / factor * slowed + kept * (1 - slowed)


def rotation(positions_T: Tensor, frequencies: Tensor, amplitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, dim/2] in FP32 of the angles at `positions_T` (int64), times `amplitude`."""
    angles = positions_T.float()[:, None] * frequencies.to(positions_T.device)
    return angles.cos() * amplitude, angles.sin() * amplitude


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, H, dim] by cos, sin [T, dim/2], in FP32; returns [T, H, dim] in the dtype of x."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1).to(x.dtype)
