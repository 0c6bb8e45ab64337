"""The training loss: sums over tokens, divided once by what the GLOBAL batch predicts.

A mean per micro-batch or per rank would weigh tokens by where they landed; a sum divided by a count known before the
first backward does not, and gradients of any split of a batch simply add up.

Legend: B sequences, S tokens of a sequence, T = B x S, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

IGNORE = -100


@dataclass(frozen=True)
class LossSums:
    """FP32 scalars of one micro-batch: nats summed over predicted tokens (next, and next but one), balance over
    sequences and layers. `mtp` is zero without an MTP module."""

    main: Tensor
    mtp: Tensor
    balance: Tensor


@dataclass(frozen=True)
class LossCounts:
    """What the global batch holds: predicted tokens, tokens the MTP module predicts, sequences."""

    main_tokens: int
    mtp_tokens: int
    sequences: int


def mtp_labels(labels_BS: Tensor) -> Tensor:
    """The token after the next, [B, S]: the last position has none, nor has one whose next token is not predicted."""
    after_next = torch.cat([labels_BS[:, 1:], torch.full_like(labels_BS[:, :1], IGNORE)], dim=1)
    return after_next.masked_fill(labels_BS == IGNORE, IGNORE)


def count_predicted(labels_BS: Tensor) -> tuple[int, int]:
    """(next tokens, tokens after the next) that labels [B, S] ask to predict."""
    return int((labels_BS != IGNORE).sum()), int((mtp_labels(labels_BS) != IGNORE).sum())


def cross_entropy_sum(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Nats summed over the labels that are not -100, in FP32."""
    return nn.functional.cross_entropy(logits_TV.float(), labels_T, ignore_index=IGNORE, reduction="sum")


def total_loss(sums: LossSums, counts: LossCounts, *, mtp_weight: float, balance_alpha: float) -> Tensor:
    """The scalar to call backward on; summed over all micro-batches and ranks it is the loss of the global batch."""
    loss = sums.main / max(counts.main_tokens, 1)
    loss = loss + sums.mtp * (mtp_weight / max(counts.mtp_tokens, 1))
    return loss + sums.balance * (balance_alpha / max(counts.sequences, 1))
