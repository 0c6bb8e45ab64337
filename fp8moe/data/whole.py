"""What a rank that computes a part of every sequence needs of the rest of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class WholeSequences:
    """int64 tensors. next_ids_BS: the id after each of the part's inputs. mtp_labels_BS: the one after that, or -100.

    Both [B, S / cp] like the part. positions_BS [B, S]: of all tokens of the sequences, whose keys are gathered.
    """

    next_ids_BS: Tensor
    mtp_labels_BS: Tensor
    positions_BS: Tensor
