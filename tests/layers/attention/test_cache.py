"""Caches of attention: tokens that come in pieces beside all of them at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fp8moe.layers.attention import GqaConfig, MlaConfig, Positions
from fp8moe.layers.attention.cache import CachedForward
from fp8moe.layers.attention.yarn import YarnConfig
from fp8moe.layers.linear import quantize_weights
from fp8moe.layers.recipe import FULL_RECOMPUTE, Precision, Recipe

DIM, EPS, LENGTH = 64, 1e-6, 20
MLA = MlaConfig(num_heads=3, q_lora_rank=32, kv_lora_rank=48, nope_dim=32, rope_dim=16, v_dim=48)
CONFIGS = {
    "mla": MLA,
    "no query latent": replace(MLA, q_lora_rank=0, v_dim=16),
    "yarn": replace(MLA, yarn=YarnConfig(factor=4.0, original_max_seq_len=8)),
    "gqa": GqaConfig(num_heads=4, num_kv_heads=2, head_dim=32, rope_dim=16),
    "window and sinks": GqaConfig(num_heads=4, num_kv_heads=2, head_dim=32, rope_dim=16, window=6, sinks=True),
}


def built(config: MlaConfig | GqaConfig, recipe: Recipe) -> torch.nn.Module:
    torch.manual_seed(0)
    layer = config.build(DIM, recipe, norm_eps=EPS, layer=0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    quantize_weights(layer)
    return layer


def at(config: MlaConfig | GqaConfig, places_BS: Tensor) -> Positions:
    return config.positions(places_BS)


@torch.no_grad()
def in_pieces(layer: torch.nn.Module, config: MlaConfig | GqaConfig, x_BSD: Tensor, pieces: list[int]) -> Tensor:
    """The layer's outputs with a cache, for tokens that come in pieces; the rows are taken in another order."""
    batch, rows_B, begin, found = len(x_BSD), torch.arange(len(x_BSD)).flip(0), 0, []
    caches = {layer: layer.new_cache(batch, LENGTH + 3)}  # type: ignore[operator]
    for size in pieces:
        places_BS = torch.arange(begin, begin + size).expand(batch, -1)
        cached = CachedForward(caches, rows_B, places_BS, begin + size, is_first=begin == 0)
        y_TD = layer(x_BSD[:, begin : begin + size].flatten(0, 1), replace(at(config, places_BS), cached=cached))
        found.append(y_TD.unflatten(0, (batch, size)))
        begin += size
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_absorbed_attention_is_plain_attention(name: str) -> None:
    config = CONFIGS[name]
    layer, x_BSD = built(config, Recipe(Precision.FP32)), torch.randn(2, LENGTH, DIM)
    with torch.no_grad():
        plain = layer(x_BSD.flatten(0, 1), at(config, torch.arange(LENGTH).expand(2, -1))).view_as(x_BSD)
    assert plain.std() > 0.1
    torch.testing.assert_close(in_pieces(layer, config, x_BSD, [7, 1, 1, 3, 8]), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(in_pieces(layer, config, x_BSD, [1] * LENGTH), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recompute", [frozenset(), FULL_RECOMPUTE])
def test_in_fp8_latents_are_kept_as_they_are_normed(recompute: frozenset) -> None:  # type: ignore[type-arg]
    """Where nothing but FP8 rows leave the norm, its output is a placeholder of NaN."""
    recipe = Recipe(Precision.FP8, recompute)
    layer, x_BSD = built(MLA, recipe), torch.randn(2, LENGTH, DIM, dtype=torch.bfloat16)
    with torch.no_grad():
        plain = layer(x_BSD.flatten(0, 1), at(MLA, torch.arange(LENGTH).expand(2, -1))).view_as(x_BSD)
    error = (in_pieces(layer, MLA, x_BSD, [7, 1, 12]) - plain).float().norm() / plain.float().norm()
    assert error < 0.05


def test_a_token_takes_what_the_family_says() -> None:
    latents = built(MLA, Recipe(Precision.FP32)).new_cache(3, 5)  # type: ignore[operator]
    assert latents.entries.shape == (3, 5, 48 + 16)
    gqa = CONFIGS["gqa"]
    assert built(gqa, Recipe(Precision.BF16)).new_cache(3, 5).entries.shape == (3, 5, 2 * 2 * 32)  # type: ignore[operator]
    assert built(gqa, Recipe(Precision.BF16)).new_cache(1, 1).entries.dtype is torch.bfloat16  # type: ignore[operator]
