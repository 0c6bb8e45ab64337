"""Who sees whom beyond causality: a window as a dense mask, windows and documents as FlexAttention's blocks of scores.

Legend: B sequences, S tokens of a sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # FlexAttention takes a second to import
    from torch.nn.attention.flex_attention import BlockMask


def window_mask(seq_len: int, window: int, device: torch.device) -> Tensor:
    """Bool [S, S]: a token sees itself and the window - 1 tokens before it."""
    return torch.ones(seq_len, seq_len, dtype=torch.bool, device=device).tril().triu(1 - window)


def causal_blocks(
    seq_len: int, device: torch.device, window: int | None = None, documents_BS: Tensor | None = None
) -> BlockMask:
    """FlexAttention's blocks: one mask for all sequences, or with the number of each token's document one each."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        shown = q >= k
        if window is not None:
            shown = shown & (k > q - window)
        return shown if documents_BS is None else shown & (documents_BS[b, q] == documents_BS[b, k])

    num_sequences = None if documents_BS is None else len(documents_BS)
    return create_block_mask(seen, num_sequences, None, seq_len, seq_len, device=device)
