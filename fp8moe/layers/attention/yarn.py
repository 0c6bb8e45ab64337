"""Rotary positions: angles of tokens, and YaRN for contexts longer than a model was trained at.

Features (2i, 2i+1) are rotated by position x frequency_i. The rotated pairs are stored apart, all first members before
all second ones, as the released checkpoints' reference does: queries and keys are permuted alike, so scores don't
change. YaRN (arXiv 2309.00071, section 3.2) leaves frequencies with many rotations inside the original context alone,
interpolates those with few by 1/s, and ramps between.

Legend: T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.limits import Range, check_fields


@dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension (arXiv 2309.00071) of a rotary part.

    The softmax scale is multiplied by (0.1 * mscale_all * ln factor + 1)^2, the rotation's amplitude by the ratio of
    that term for `mscale` and for `mscale_all`.
    """

    factor: float = 40.0  # new length / original length
    original_max_seq_len: int = 4096  # tokens of a sequence before the extension
    beta_slow: float = 1.0  # rotations below which a frequency is interpolated; the paper's alpha
    beta_fast: float = 32.0  # rotations above which a frequency stays; the paper's beta
    mscale: float = 1.0  # of the rotation's amplitude
    mscale_all: float = 1.0  # of the softmax scale, and below the amplitude's
    truncate: bool = True  # the ramp begins and ends at whole pairs; false (GPT-OSS): where the rotations say

    def __post_init__(self) -> None:
        check_fields(
            self,
            "model.attention.yarn",
            factor=Range(least=1, most=2**24, use="use 1 or more, less would shorten the context"),
            original_max_seq_len=Range(least=1, most=2**24),
            beta_slow=Range(above=0, most=1e6),
            beta_fast=Range(above=0, most=1e6),
            mscale=Range(least=0, most=100),
            mscale_all=Range(least=0, most=100),
        )
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"model.attention.yarn.beta_fast={self.beta_fast} must not be below beta_slow={self.beta_slow}, "
                "the ramp goes from few rotations to many: use 32.0 and 1.0"
            )

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

    begins, ends = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    first = max(math.floor(begins) if yarn.truncate else begins, 0)
    last = min(math.ceil(ends) if yarn.truncate else ends, dim - 1)
    width = max(last - first, 1e-3)  # both ends on one pair: a step instead of a ramp
    slowed = ((torch.arange(dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    kept = inverse_frequencies(dim, theta)
    return kept / yarn.factor * slowed + kept * (1 - slowed)


def rotation(positions_T: Tensor, dim: int, theta: float, yarn: YarnConfig | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, dim/2] in FP32 of the angles at `positions_T` (int64), by YaRN where it is given."""
    with positions_T.device:  # made there: the host would wait for a copy, every micro-batch
        frequencies = inverse_frequencies(dim, theta) if yarn is None else yarn_frequencies(dim, theta, yarn)
    amplitude = 1.0 if yarn is None else yarn.amplitude
    angles = positions_T.float()[:, None] * frequencies
    return angles.cos() * amplitude, angles.sin() * amplitude
