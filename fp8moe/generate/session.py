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
from fp8moe.model.block import Block
from fp8moe.model.transformer import Transformer


class Session:
    """Caches of `rows` sequences of at most `length` tokens for the blocks of `model`, and its MTP module's if `mtp`.

    The model has all its blocks, embedding and head.
    """

    def __init__(self, model: Transformer, rows: int, length: int, *, mtp: bool = False) -> None:
        assert model.embedding is not None and model.norm is not None and model.head is not None
        self._model, self._embedding, self._norm, self._head = model, model.embedding, model.norm, model.head
        blocks = [block for block in model.blocks.values() if isinstance(block, Block)]
        if mtp:
            assert model.mtp is not None
            blocks.append(model.mtp.block)
        self._caches: dict[nn.Module, LayerCache] = {block.attn: block.attn.new_cache(rows, length) for block in blocks}

    def forward(self, ids: Sequence[Sequence[int]], rows: Sequence[int], starts: Sequence[int]) -> Tensor:
        """Hidden states [B, S, D] behind the final norm, of tokens `ids` from places `starts` on of sequences `rows`.

        All starts are 0, or none is.
        """
        positions = self._positions(len(ids[0]), rows, starts)
        hidden_TD, _ = self._model.run_blocks(self._embed(ids), positions)
        return self._norm(hidden_TD).tensor.unflatten(0, (len(rows), -1))

    def draft(
        self, hidden_BSD: Tensor, ids: Sequence[Sequence[int]], rows: Sequence[int], starts: Sequence[int]
    ) -> Tensor:
        """The MTP module's hidden states [B, S, D] for the head: of a token's hidden state and the token after it."""
        mtp = self._model.mtp
        assert mtp is not None
        positions = self._positions(len(ids[0]), rows, starts)
        x_TD, _ = mtp.block(mtp.enter(hidden_BSD.flatten(0, 1), self._embed(ids)), positions)
        return mtp.leave(x_TD).tensor.unflatten(0, (len(rows), -1))

    def take(self, rows: Tensor) -> None:
        """Make the caches those of `rows` (int64), in that order; a row may be left out, or be there several times."""
        for cache in self._caches.values():
            cache.entries = cache.entries[rows]

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """[B, V] in the model's unquantized dtype."""
        return self._head(hidden_BD)

    def _embed(self, ids: Sequence[Sequence[int]]) -> Tensor:
        return self._embedding(torch.tensor(ids, device=self._embedding.weight.device).flatten())

    def _positions(self, seq_len: int, rows: Sequence[int], starts: Sequence[int]) -> Positions:
        device = self._embedding.weight.device
        positions_BS = torch.tensor(starts, device=device)[:, None] + torch.arange(seq_len, device=device)
        cached = CachedForward(self._caches, tuple(rows), positions_BS, max(starts) + seq_len, is_first=not any(starts))
        return replace(self._model.positions(positions_BS), cached=cached)
