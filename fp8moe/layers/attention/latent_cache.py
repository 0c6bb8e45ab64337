"""The cache of latent attention: latents, rotated key parts, and the up projection cut into its two halves.

Legend: T tokens, H heads, R features of the latent, N and M any.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fp8moe.layers.attention.cache import LayerCache
from fp8moe.layers.linear import Linear, product
from fp8moe.layers.recipe import Recipe


class LatentSizes(Protocol):
    """Sizes of latent attention; see `mla.MlaConfig`."""

    @property
    def num_heads(self) -> int: ...
    @property
    def kv_lora_rank(self) -> int: ...
    @property
    def nope_dim(self) -> int: ...
    @property
    def rope_dim(self) -> int: ...
    @property
    def v_dim(self) -> int: ...


class Latent(Protocol):
    """What the cache reads of a layer of latent attention."""

    recipe: Recipe
    kv_b: Linear

    @property
    def config(self) -> LatentSizes: ...


class LatentCache(LayerCache):
    """Latents and rotated key parts; beside them the up projection in two: keys' [H, nope, R], values' [H, R, v]."""

    def __init__(self, attention: Latent, rows: int, length: int) -> None:
        c, up = attention.config, attention.kv_b
        weight = up.blocks.dequantize(up.weight.dtype) if attention.recipe.fp8 else up.weight.detach()
        super().__init__(rows, length, c.kv_lora_rank + c.rope_dim, weight)
        keys, values = weight.unflatten(0, (c.num_heads, -1)).split([c.nope_dim, c.v_dim], dim=1)
        self.key_up_HNR, self.value_up_HRV = keys.contiguous(), values.mT.contiguous()


def by_heads(x_THN: Tensor, weight_HNM: Tensor) -> Tensor:
    """[T, H, N] times each head's [N, M] -> [T, H, M]."""
    return product(x_THN.transpose(0, 1), weight_HNM).transpose(0, 1)
