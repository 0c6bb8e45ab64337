"""Rotary positions and YaRN's frequencies, against their formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fp8moe.kernels.rope import rope_queries
from fp8moe.layers.attention.yarn import YarnConfig, inverse_frequencies, rotation, yarn_frequencies

V3 = YarnConfig(factor=40.0, original_max_seq_len=4096)


def test_rotation_depends_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 16)

    def score(i: int, j: int) -> torch.Tensor:
        at = [rotation(torch.tensor([p]), 16, 1e4, None) for p in (i, j)]
        return (rope_queries(q, *at[0]) * rope_queries(k, *at[1])).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=1e-4, atol=1e-4)
    assert abs(score(7, 3) - score(7, 5)) > 1e-3


def test_neighbouring_features_are_a_pair_and_turn_forwards() -> None:
    """As complex numbers: pair i of position p is multiplied by exp(i p theta^(-2i/dim)); each dtype keeps its own."""
    x = torch.randn(5, 3, 8)
    cos, sin = rotation(torch.arange(5), 8, 100.0, None)
    angles = torch.arange(5)[:, None] * 100.0 ** (-torch.arange(0, 8, 2) / 8)
    turned = torch.complex(x[..., 0::2], x[..., 1::2]) * torch.polar(torch.ones(5, 4), angles)[:, None]
    torch.testing.assert_close(rope_queries(x, cos, sin), torch.cat([turned.real, turned.imag], -1))
    assert rope_queries(x.bfloat16(), cos, sin).dtype is torch.bfloat16 and cos.dtype is torch.float32


def test_yarn_scales_as_published() -> None:
    assert V3.softmax_factor == pytest.approx((0.1 * 3.6888794541139363 + 1) ** 2)
    assert V3.amplitude == 1.0
    other = replace(V3, mscale=0.707, mscale_all=1.4)
    assert other.softmax_factor == pytest.approx((0.14 * math.log(40) + 1) ** 2)
    assert other.amplitude == pytest.approx((0.0707 * math.log(40) + 1) / (0.14 * math.log(40) + 1))
    without = replace(V3, mscale_all=0.0)
    assert without.softmax_factor == 1.0 and without.amplitude == pytest.approx(0.1 * math.log(40) + 1)
    assert replace(V3, mscale=0.0).amplitude == pytest.approx(0.1 * math.log(40) + 1)
    assert replace(V3, factor=1.0).softmax_factor == replace(V3, factor=1.0).amplitude == 1.0


def test_a_factor_that_shortens_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"model\.attention\.yarn\.factor=0\.5 must be at least 1: use 1 or more, less would shorten"
    ):
        YarnConfig(factor=0.5)


def test_frequencies_are_kept_interpolated_and_blended_between() -> None:
    """DeepSeek-V3: 64 rotary features, theta 10000. By hand: pair i turns 4096 theta^(-2i/64) / 2 pi times in the
    original context, 32 times or more up to pair 10.47 and once or less from pair 22.51 on; rounded outwards the ramp
    goes from pair 10 to pair 23."""
    plain, scaled = inverse_frequencies(64, 1e4), yarn_frequencies(64, 1e4, V3)
    turns = 4096 * plain / (2 * math.pi)
    assert turns[10] > 32 > turns[11] and turns[22] > 1 > turns[23]
    assert torch.equal(scaled[:11], plain[:11])
    torch.testing.assert_close(scaled[23:], plain[23:] / 40)
    share = (torch.arange(10, 24) - 10) / 13
    torch.testing.assert_close(scaled[10:24], plain[10:24] * (1 - share) + plain[10:24] / 40 * share)


def test_a_ramp_that_leaves_the_pairs_is_cut_at_their_ends() -> None:
    """Four pairs and a short context: the ramp would begin before pair 0; and a step where both ends are one pair."""
    plain = inverse_frequencies(8, 1e4)
    short = YarnConfig(factor=4.0, original_max_seq_len=16)
    ratio = yarn_frequencies(8, 1e4, short) / plain
    torch.testing.assert_close(ratio, torch.tensor([1.0, 0.25, 0.25, 0.25]))  # the ramp: pairs 0 to 1
    step = replace(short, original_max_seq_len=1, beta_fast=1.001)
    torch.testing.assert_close(yarn_frequencies(8, 1e4, step) / plain, torch.tensor([1.0, 0.25, 0.25, 0.25]))
    endless = replace(short, original_max_seq_len=2**24)
    ratio = yarn_frequencies(8, 1e4, endless) / plain
    assert torch.equal(ratio, torch.ones(4)), "every pair turns more than 32 times"


def test_rotation_by_yarn_has_its_frequencies_and_amplitude() -> None:
    yarn = replace(V3, mscale=0.707, mscale_all=1.4)
    cos, sin = rotation(torch.tensor([0, 3]), 64, 1e4, yarn)
    angles = 3.0 * yarn_frequencies(64, 1e4, yarn)
    torch.testing.assert_close(cos, torch.stack([torch.ones(32), angles.cos()]) * yarn.amplitude)
    torch.testing.assert_close(sin, torch.stack([torch.zeros(32), angles.sin()]) * yarn.amplitude)
