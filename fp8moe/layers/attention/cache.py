"""Caches of attention, for generation: what a layer keeps of every token, and attention of new tokens to it.

A layer keeps one entry of `width` features a token, in rows of `length` tokens, a row a sequence. What an entry is the
family says: keys and values, or the latent that both are made of (`mla`). A forward brings S new tokens for each of B
sequences, each sequence at its own place; sequences are ragged, so every one has its own positions and there is no
padding. An entry that is written again (a draft that was refused) replaces the old one; entries behind a sequence's
end are never attended to.

Decoding waits for memory, so rows of a cache are read where they lie, once (`kernels.decode_attention`). Refused: pages
of a fixed size (vLLM), which save memory where thousands of sequences come and go; here a batch is known when it
starts.

Legend: B sequences, S new tokens of each, L tokens that the longest has, H heads, G heads of keys and values, d
features of a query or key, V of a value, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fp8moe.kernels.decode_attention import decode_attention


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

    def write(self, layer: nn.Module, entries_TW: Tensor) -> None:
        """Keep the entries of the new tokens, sequence after sequence."""
        entries, places_BS = self.caches[layer].entries, self.positions_BS
        rows_B = torch.arange(len(places_BS), device=places_BS.device) if self.rows_B is None else self.rows_B
        entries[rows_B[:, None], places_BS] = entries_TW.view(*places_BS.shape, -1)

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, scale: float, *, window: int | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of q [B, S, H, d] to a layer's whole cache as keys [rows, length, G, d] and values -> [B, S, H, V].

        sinks_H: a logit a head in FP32 that takes part in the softmax and has no value.
        """
        return decode_attention(
            q, keys, values, self.positions_BS, self.rows_B, sinks_H, length=self.length, scale=scale, window=window
        )
