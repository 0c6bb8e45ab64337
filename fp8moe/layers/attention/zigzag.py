"""The zigzag: which tokens of every sequence a rank of context parallelism holds, and how parts become whole again.

A sequence is cut into 2 cp equal chunks; rank r holds chunks r and 2 cp - 1 - r. Under causal attention a query's cost
grows with its place, and a chunk near the beginning is paired with one near the end: every rank multiplies the same.
One run of neighbouring tokens a rank was refused, the last rank would do almost twice the mean.

Legend: B sequences, S tokens of a sequence, T = B x S, C = S / 2 cp tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor


def chunks_of(rank: int, cp: int) -> tuple[int, int]:
    """The numbers of the two chunks of a rank, of 0 to 2 cp - 1."""
    return rank, 2 * cp - 1 - rank


def part_of(x_BS: Tensor, rank: int, cp: int) -> Tensor:
    """[B, S, ...] -> [B, S / cp, ...], the rank's tokens. S is a multiple of 2 cp."""
    chunks = x_BS.unflatten(1, (2 * cp, -1))
    return torch.cat([chunks[:, chunk] for chunk in chunks_of(rank, cp)], dim=1)


def parts_of(x_Tn: Tensor, num_sequences: int, cp: int) -> Tensor:
    """[T, n] of whole sequences -> contiguous [cp, T / cp, n], the tokens of each rank."""
    chunks = x_Tn.view(num_sequences, 2 * cp, -1, x_Tn.shape[1])
    both = torch.stack([chunks[:, :cp], chunks[:, cp:].flip(1)], dim=2)  # [B, cp, 2, C, n]
    return both.transpose(0, 1).reshape(cp, -1, x_Tn.shape[1])


def joined_parts(parts: Tensor, num_sequences: int) -> Tensor:
    """The inverse: [cp, T / cp, n] of any strides -> contiguous [T, n]."""
    features = parts.shape[2]
    both = parts.unflatten(1, (num_sequences, 2, -1))  # [cp, B, 2, C, n]
    early, late = both[:, :, 0].transpose(0, 1), both[:, :, 1].flip(0).transpose(0, 1)
    return torch.cat([early, late], dim=1).reshape(-1, features)
