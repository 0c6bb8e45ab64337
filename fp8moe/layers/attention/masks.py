"""Who sees whom beyond causality: a window as a dense mask, windows and documents as FlexAttention's blocks of scores.

Legend: B sequences, S tokens of a sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # FlexAttention takes a second to import
    from torch.nn.attention.flex_attention import BlockMask


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Bool [queries, keys], the last query at the last key: a token sees itself and those before it, of a window."""
    ahead = keys - queries
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(ahead)
    return seen if window is None else seen.triu(ahead + 1 - window)


def causal_blocks(
    seq_len: int,
    device: torch.device,
    window: int | None = None,
    documents_BS: Tensor | None = None,
    places: Tensor | None = None,
) -> BlockMask:
    """FlexAttention's blocks: one mask for all sequences, or with the number of each token's document one each.

    places: where in its sequence each query stands, int64; None: there are as many queries as keys.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q = q if places is None else places[q]
        shown = q >= k
        if window is not None:
            shown = shown & (k > q - window)
        return shown if documents_BS is None else shown & (documents_BS[b, q] == documents_BS[b, k])

    num_sequences = None if documents_BS is None else len(documents_BS)
    queries = seq_len if places is None else len(places)
    return create_block_mask(seen, num_sequences, None, queries, seq_len, device=device)
