"""Rotary position embedding of interleaved pairs, with YaRN's blend of frequencies.

Features (2i, 2i+1) are rotated by position x frequency_i. The rotated pairs are stored apart, all first members before
all second ones, as the released checkpoints' reference does: queries and keys are permuted alike, so scores don't
change. YaRN (arXiv 2309.00071, section 3.2) leaves frequencies with many rotations inside the original context alone,
interpolates those with few by 1/s, and ramps between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension (arXiv 2309.00071) of a rotary part.

    `factor` is s = new length / original length; `beta_slow`, `beta_fast` (the paper's alpha and beta) bound the ramp
    between interpolated and untouched frequencies. The softmax scale is multiplied by (0.1 * mscale_all * ln s + 1)^2,
    the rotation's amplitude by the ratio of that term for `mscale` and for `mscale_all`.
    """

    factor: float = 40.0
    original_max_seq_len: int = 4096
    beta_slow: float = 1.0
    beta_fast: float = 32.0
    mscale: float = 1.0
    mscale_all: float = 1.0

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"model.attention.yarn.factor={self.factor} would shorten the context: use 1 or more")

    @staticmethod
    def _attention_scale(factor: float, mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0

    @property
    def softmax_factor(self) -> float:
        """Factor of the softmax scale."""
        return self._attention_scale(self.factor, self.mscale_all) ** 2 if self.mscale_all else 1.0

    @property
    def amplitude(self) -> float:
        """Factor of the rotary cosines and sines."""
        if self.mscale and self.mscale_all:
            return self._attention_scale(self.factor, self.mscale) / self._attention_scale(self.factor, self.mscale_all)
        return self._attention_scale(self.factor, 1.0)


def inverse_frequencies(dim: int, theta: float) -> Tensor:
    """theta^(-2i/dim) for each of the dim/2 pairs, FP32 [dim/2]."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def yarn_frequencies(dim: int, theta: float, yarn: YarnConfig) -> Tensor:
    """Inverse frequencies for a context `yarn.factor` times the original length, FP32 [dim/2].

    A pair that turns `beta_fast` times or more within the original context keeps its frequency, one that turns
    `beta_slow` times or less is slowed by `factor`; between, a linear ramp over the pair's index.
    """

    def pair_that_turns(rotations: float) -> float:
        return dim * math.log(yarn.original_max_seq_len / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(yarn.beta_slow)), dim - 1)
    width = max(last - first, 1e-3)  # both ends on one pair: a step instead of a ramp
    slowed = ((torch.arange(dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    kept = inverse_frequencies(dim, theta)
    return kept / yarn.factor * slowed + kept * (1 - slowed)


def rotation(positions_T: Tensor, dim: int, theta: float, yarn: YarnConfig | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, dim/2] in FP32 of the angles at `positions_T` (int64), by YaRN where it is given."""
    frequencies = inverse_frequencies(dim, theta) if yarn is None else yarn_frequencies(dim, theta, yarn)
    amplitude = 1.0 if yarn is None else yarn.amplitude
    angles = positions_T.float()[:, None] * frequencies.to(positions_T.device)
    return angles.cos() * amplitude, angles.sin() * amplitude


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, H, dim] by cos, sin [T, dim/2], in FP32; returns [T, H, dim] in the dtype of x."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1).to(x.dtype)
