"""A model with caches: forwards of new tokens of some sequences, through the blocks that training runs.

Attention finds its cache by the positions it is given (`layers.attention.cache`); all else of a block is what it is for
evaluation, experts through the dispatcher included. So on several ranks every forward is collective over the ranks that
share experts, and each brings tokens of its own sequences.

Legend: B sequences, S new tokens of each, T = B x S, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fp8moe.layers.attention import Positions
from fp8moe.layers.attention.cache import CachedForward, LayerCache
from fp8moe.model.transformer import Transformer


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
        self._device = next(model.parameters()).device

    def forward(self, ids: Sequence[Sequence[int]], rows: Sequence[int], starts: Sequence[int]) -> Tensor:
        """Hidden states [B, S, D] behind the final norm, of tokens `ids` from places `starts` on of sequences `rows`.

        All starts are 0, or none is.
        """
        hidden_TD = self.blocks(range(self._model.config.num_layers), self.embed(ids), len(ids[0]), rows, starts)
        return self.normed(hidden_TD, len(rows))

    def embed(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Token ids -> [T, D]."""
        assert self._model.embedding is not None
        return self._model.embedding(torch.tensor(ids, device=self._device).flatten())

    def blocks(
        self, layers: Sequence[int], x_TD: Tensor, seq_len: int, rows: Sequence[int], starts: Sequence[int]
    ) -> Tensor:
        """[T, D] through some blocks, of S tokens of each of the sequences `rows`, as in `forward`."""
        positions = self._positions(seq_len, rows, starts)
        for layer in layers:
            x_TD, _ = self._model.block(layer)(x_TD, positions)
        return x_TD

    def normed(self, hidden_TD: Tensor, num_sequences: int) -> Tensor:
        """What the last block gave, behind the final norm, [B, S, D]."""
        assert self._model.norm is not None
        normed: Tensor = self._model.norm(hidden_TD).tensor
        return normed.unflatten(0, (num_sequences, -1))

    def draft(
        self, hidden_BSD: Tensor, ids: Sequence[Sequence[int]], rows: Sequence[int], starts: Sequence[int]
    ) -> Tensor:
        """The MTP module's hidden states [B, S, D] for the head: of a token's hidden state and the token after it."""
        mtp = self._model.mtp
        assert mtp is not None
        positions = self._positions(len(ids[0]), rows, starts)
        x_TD, _ = mtp.block(mtp.enter(hidden_BSD.flatten(0, 1), self.embed(ids)), positions)
        return mtp.leave(x_TD).tensor.unflatten(0, (len(rows), -1))

    def take(self, rows: Tensor) -> None:
        """Make the caches those of `rows` (int64), in that order; a row may be left out, or be there several times."""
        for cache in self._caches.values():
            cache.entries = cache.entries[rows]

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """[B, V] in the model's unquantized dtype."""
        assert self._model.head is not None
        logits: Tensor = self._model.head(hidden_BD)
        return logits

    def _positions(self, seq_len: int, rows: Sequence[int], starts: Sequence[int]) -> Positions:
        positions_BS = torch.tensor(starts, device=self._device)[:, None] + torch.arange(seq_len, device=self._device)
        cached = CachedForward(self._caches, tuple(rows), positions_BS, max(starts) + seq_len, is_first=not any(starts))
        return replace(self._model.positions(positions_BS), cached=cached)
