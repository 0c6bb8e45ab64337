"""A batch made from nothing but a seed, for tests of the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    inputs_BS: Tensor
    labels_BS: Tensor
    positions_BS: Tensor
    document_lengths: tuple[int, ...] | None = None
    whole: None = None
    experts_BSLK: Tensor | None = None

    def sequences(self, part: slice) -> Tokens:
        return Tokens(self.inputs_BS[part], self.labels_BS[part], self.positions_BS[part])


def tokens(vocab_size: int, batch: int = 2, seq_len: int = 24, seed: int = 1) -> Tokens:
    ids = torch.randint(vocab_size, (batch, seq_len + 1), generator=torch.Generator().manual_seed(seed))
    return Tokens(ids[:, :-1], ids[:, 1:], torch.arange(seq_len).expand(batch, -1))
