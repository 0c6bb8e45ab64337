"""Caches of attention, for generation: what a layer keeps of every token, and attention of new tokens to it.

A layer keeps one entry of `width` features a token, in rows of `length` tokens, a row a sequence. What an entry is the
family says: keys and values, or the latent that both are made of (`mla`). A forward brings S new tokens for each of B
sequences, each sequence at its own place; sequences are ragged, so every one has its own positions and there is no
padding. An entry that is written again (a draft that was refused) replaces the old one; entries behind a sequence's end
are masked.

Numerics: scores and softmax in FP32, probabilities rounded to the dtype of the values, as in the fused kernels.
Decoding waits for memory, so scores are made of the entries as they lie: a GPU multiplies BF16 into FP32, and where
that can't be, the keys of a few sequences are widened at a time, which stay in a processor's cache. PyTorch's fused
kernels take neither a latent's 576 features nor queries of several places behind a cache. Refused: pages of a fixed
size (vLLM), which save memory where thousands of sequences come and go; here a batch is known when it starts.

Legend: B sequences, S new tokens of each, L tokens that the longest has, H heads, G heads of keys and values, d
features of a query or key, V of a value, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from fp8moe.layers.linear import product

WIDENED_VALUES = 1 << 19  # keys that are copied to FP32 at once, but for one sequence at least


class LayerCache:
    """Entries [rows, length, width] of one layer, zero at first: what is masked is multiplied by 0, so it is finite."""

    def __init__(self, rows: int, length: int, width: int, like: Tensor) -> None:
        self.entries = torch.zeros(rows, length, width, dtype=like.dtype, device=like.device)


class Cached(Protocol):
    """A layer that can keep what it computed of earlier tokens."""

    def new_cache(self, rows: int, length: int) -> LayerCache:
        """A cache of `rows` sequences of at most `length` tokens; needs the weights, which must not change after."""
        ...


@dataclass(frozen=True)
class CachedForward:
    """What a forward of S new tokens of each of B sequences writes to the caches and reads of them.

    caches: by layer. rows_B: the sequences' rows in them, int64; None: all rows, in order. positions_BS: the tokens'
    places, int64. length: entries of a row that are read, at least the tokens of the longest of the sequences, the new
    ones included. is_first: the tokens are the first S of their sequences, so that they attend to each other alone and
    nothing is read. Nothing here makes the host wait.
    """

    caches: Mapping[nn.Module, LayerCache]
    rows_B: Tensor | None
    positions_BS: Tensor
    length: int
    is_first: bool

    @cached_property
    def mask_BSL(self) -> Tensor:
        """True where a new token may look at an entry: at itself and what came before it."""
        return torch.arange(self.length, device=self.positions_BS.device) <= self.positions_BS[..., None]

    def window_mask_BSL(self, window: int | None) -> Tensor:
        """The same for a layer whose tokens see `window` tokens, themselves included; None: all before them."""
        if window is None:
            return self.mask_BSL
        places_L = torch.arange(self.length, device=self.positions_BS.device)
        return self.mask_BSL & (places_L > self.positions_BS[..., None] - window)

    def write(self, layer: nn.Module, entries_TW: Tensor) -> None:
        """Keep the entries of the new tokens, sequence after sequence."""
        entries, places_BS = self.caches[layer].entries, self.positions_BS
        rows_B = torch.arange(len(places_BS), device=places_BS.device) if self.rows_B is None else self.rows_B
        entries[rows_B[:, None], places_BS] = entries_TW.view(*places_BS.shape, -1)

    def read(self, layer: nn.Module) -> Tensor:
        """The entries of the sequences, [B, L, W]: a view where all rows are asked for."""
        entries = self.caches[layer].entries[:, : self.length]
        return entries if self.rows_B is None else entries[self.rows_B]


def attend_to_cache(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask_BSL: Tensor, sinks_H: Tensor | None = None
) -> Tensor:
    """softmax(scale q k^T) v of q [B, S, H, d], k [B, L, G, d], v [B, L, G, V] -> [B, S, H, V].

    H/G neighbouring heads share a key. sinks_H: a logit a head that takes part in the softmax and has no value.
    """
    S, H, G = q.shape[1], q.shape[2], k.shape[2]
    queries = q.unflatten(2, (G, H // G)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, G, H/G x S, d]
    scores = _products(queries, k).mul_(scale).unflatten(2, (H // G, S))
    scores.masked_fill_(~mask_BSL[:, None, None], float("-inf"))
    if sinks_H is not None:
        sinks = sinks_H.float().view(1, G, H // G, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    p = scores.softmax(-1)[..., : k.shape[1]].to(v.dtype).flatten(2, 3)
    out = product(p, v.transpose(1, 2))
    return out.unflatten(2, (H // G, S)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """FP32 [B, G, M, L] of q [B, G, M, d] and k [B, L, G, d], of one dtype."""
    if q.dtype is torch.float32:
        return q @ k.permute(0, 2, 3, 1)
    if q.is_cuda:
        flat = torch.bmm(q.flatten(0, 1), k.transpose(1, 2).flatten(0, 1).mT, out_dtype=torch.float32)
        return flat.unflatten(0, q.shape[:2])
    out = torch.empty(*q.shape[:3], k.shape[1], device=q.device)
    size = max(1, WIDENED_VALUES // k[0].numel())
    for part, queries, keys in zip(out.split(size), q.split(size), k.split(size), strict=True):
        torch.matmul(queries.float(), keys.float().permute(0, 2, 3, 1), out=part)
    return out
