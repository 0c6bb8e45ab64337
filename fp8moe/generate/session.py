"""A model with caches: forwards of new tokens of some sequences, through the blocks that training runs.

Attention finds its cache by the positions it is given (`layers.attention.cache`); all else of a block is what it is for
evaluation, experts through the dispatcher included. So on several ranks every forward is collective over the ranks that
share experts, and each brings tokens of its own sequences.

Legend: B sequences, S new tokens of each, T = B x S, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fp8moe.layers.attention import Positions
from fp8moe.layers.attention.cache import CachedForward, LayerCache
from fp8moe.model.transformer import Transformer


@dataclass(frozen=True)
class Where:
    """Where the new tokens of B sequences go.

    rows_B: the sequences' rows in the caches, int64; None: all rows, in order. starts_B: the place of each one's first
    new token, int64: 0 for all, which is `is_first`, or for none. length: tokens that no sequence exceeds with the new
    ones; more than needed are masked.
    """

    rows_B: Tensor | None
    starts_B: Tensor
    length: int
    is_first: bool = False


class Session:
    """Caches of `rows` sequences of at most `length` tokens for the blocks of `model`, and its MTP module's if `mtp`.

    layers: of the blocks, where a pipeline's rank has some of them; None: the model has all.
    """

    def __init__(
        self, model: Transformer, rows: int, length: int, *, mtp: bool = False, layers: Sequence[int] | None = None
    ) -> None:
        self._model = model
        blocks = [model.block(layer) for layer in (range(model.config.num_layers) if layers is None else layers)]
        if mtp:
            assert model.mtp is not None
            blocks.append(model.mtp.block)
        self._caches: dict[nn.Module, LayerCache] = {block.attn: block.attn.new_cache(rows, length) for block in blocks}
        self._device, self._rows = next(model.parameters()).device, rows

    def where(self, rows: Sequence[int], starts: Sequence[int], seq_len: int) -> Where:
        """Of `seq_len` new tokens of each of the sequences `rows`, from places `starts` on."""
        every = tuple(rows) == tuple(range(self._rows))
        rows_B = None if every else torch.tensor(rows, device=self._device)
        return Where(rows_B, torch.tensor(starts, device=self._device), max(starts) + seq_len, not any(starts))

    def forward(self, ids_BS: Tensor, where: Where) -> Tensor:
        """Hidden states [B, S, D] behind the final norm, of new tokens' ids."""
        layers = range(self._model.config.num_layers)
        hidden_TD = self.blocks(layers, self.embed(ids_BS), ids_BS.shape[1], where)
        return self.normed(hidden_TD).unflatten(0, ids_BS.shape)

    def ids(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """[B, S], int64."""
        return torch.tensor(ids, device=self._device)

    def embed(self, ids_BS: Tensor) -> Tensor:
        """Token ids -> [T, D]."""
        assert self._model.embedding is not None
        return self._model.embedding(ids_BS.flatten())

    def blocks(self, layers: Sequence[int], x_TD: Tensor, seq_len: int, where: Where) -> Tensor:
        """[T, D] through some blocks, of S tokens of each sequence."""
        positions = self._positions(seq_len, where)
        for layer in layers:
            x_TD, _ = self._model.block(layer)(x_TD, positions)
        return x_TD

    def normed(self, hidden_TD: Tensor) -> Tensor:
        """What the last block gave, behind the final norm, [T, D]."""
        assert self._model.norm is not None
        normed: Tensor = self._model.norm(hidden_TD).tensor
        return normed

    def draft(self, hidden_BSD: Tensor, ids_BS: Tensor, where: Where) -> Tensor:
        """The MTP module's hidden states [B, S, D] for the head: of a token's hidden state and the token after it."""
        mtp = self._model.mtp
        assert mtp is not None
        positions = self._positions(ids_BS.shape[1], where)
        x_TD, _ = mtp.block(mtp.enter(hidden_BSD.flatten(0, 1), self.embed(ids_BS)), positions)
        return mtp.leave(x_TD).tensor.unflatten(0, ids_BS.shape)

    def take(self, rows: Tensor) -> None:
        """Make the caches those of `rows` (int64), in that order; a row may be left out, or be there several times."""
        for cache in self._caches.values():
            cache.entries = cache.entries[rows]
        self._rows = len(rows)

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """[B, V] in the model's unquantized dtype."""
        assert self._model.head is not None
        logits: Tensor = self._model.head(hidden_BD)
        return logits

    def _positions(self, seq_len: int, where: Where) -> Positions:
        positions_BS = where.starts_B[:, None] + torch.arange(seq_len, device=self._device)
        cached = CachedForward(self._caches, where.rows_B, positions_BS, where.length, is_first=where.is_first)
        return replace(self._model.positions(positions_BS), cached=cached)
