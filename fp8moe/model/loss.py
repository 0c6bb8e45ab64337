"""The training loss: sums over tokens, divided once by what the GLOBAL batch predicts.

A mean per micro-batch or per rank would weigh tokens by where they landed; a sum divided by a count known before the
first backward does not, and gradients of any split of a batch simply add up.

Legend: B sequences, S tokens of a sequence, T = B x S, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.kernels.cross_entropy import IGNORE

__all__ = ["IGNORE"]


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


def count_predicted(labels_BS: Tensor, mtp_labels_BS: Tensor | None = None) -> tuple[int, int]:
    """(next tokens, tokens after the next) that labels [B, S] ask to predict; mtp_labels: where these are a part."""
    after_next_BS = mtp_labels(labels_BS) if mtp_labels_BS is None else mtp_labels_BS
    return int((labels_BS != IGNORE).sum()), int((after_next_BS != IGNORE).sum())


@dataclass(frozen=True)
class LossWeights:
    """What each sum of a `LossSums` counts in the total loss; scalars of the device where they change under a graph."""

    main: float | Tensor
    mtp: float | Tensor
    balance: float | Tensor


def loss_weights(counts: LossCounts, *, mtp_weight: float, balance_alpha: float) -> LossWeights:
    """Weights that make sums over micro-batches and ranks add up to the loss of the global batch."""
    return LossWeights(
        main=1 / max(counts.main_tokens, 1),
        mtp=mtp_weight / max(counts.mtp_tokens, 1),
        balance=balance_alpha / max(counts.sequences, 1),
    )


def total_loss(sums: LossSums, weights: LossWeights) -> Tensor:
    """The scalar to call backward on; summed over all micro-batches and ranks it is the loss of the global batch."""
    return sums.main * weights.main + sums.mtp * weights.mtp + sums.balance * weights.balance


def weight_on(device: torch.device, weight: float | Tensor) -> Tensor:
    """A weight as an FP32 scalar on the device, which nothing waits for."""
    return weight if isinstance(weight, Tensor) else torch.full((), weight, dtype=torch.float32, device=device)


class LossTally:
    """What a rank's losses of a step add up to, in FP64 and on the device: `sums` are main, mtp, balance."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add_losses(self, main: Tensor, mtp: Tensor | None = None) -> None:
        """The losses of one micro-batch, on the rank that has the head."""
        self.sums[0] += main
        if mtp is not None:
            self.sums[1] += mtp

    def add_balance(self, loss: Tensor) -> None:
        """The balance loss of one block on one micro-batch."""
        self.sums[2] += loss
