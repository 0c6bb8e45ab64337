"""The plan of a permutation: for each of the R rows that experts see, which row of x it copies and for which slot.

It stands apart from the ops of `permute` because their implementations and their registration name it too.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import TILE

_IDS = (torch.int64, torch.int16)


@dataclass(frozen=True)
class RowMap:
    """Where the R permuted rows come from.

    source_R: int64, row of x, -1 for padding. slot_R: int64, n * topk + k of the copy, -1 for padding.
    group_offsets: int32 [E+1], rows of expert e are [group_offsets[e], group_offsets[e+1]). tokens_per_expert: int64
    [E], without padding. row_of_slot: int32 [N * topk], the inverse of slot_R: the row of each copy, -1 where it is not
    here. num_rows: N, rows of x. topk: copies a row of x may have.
    """

    source_R: Tensor
    slot_R: Tensor
    group_offsets: Tensor
    tokens_per_expert: Tensor
    row_of_slot: Tensor
    num_rows: int
    topk: int

    def of_slots(self) -> "RowMap":
        """The map of one number a slot, [N * topk], to one a row: of routing weights, and back."""
        num_slots = self.num_rows * self.topk
        return RowMap(
            self.slot_R, self.slot_R, self.group_offsets, self.tokens_per_expert, self.row_of_slot, num_slots, 1
        )


def check_ids(topk_ids: Tensor) -> None:
    """ValueError unless ids are of a kind that plans take."""
    if topk_ids.dim() != 2 or topk_ids.dtype not in _IDS:
        raise ValueError(
            f"topk_ids must be int64 [N, K], or int16 as in a message, got {topk_ids.dtype} {list(topk_ids.shape)}: "
            "cast or reshape"
        )


def ids_from(topk_ids: Tensor, first: int, num_experts: int) -> Tensor:
    """Ids as plans take them -> int64, counted from `first`; -1 for those that none of the experts has."""
    ids_NK = (~topk_ids if topk_ids.dtype is torch.int16 else topk_ids).long() - first
    return ids_NK.masked_fill((ids_NK < 0) | (ids_NK >= num_experts), -1)


def invert(slot_R: Tensor, num_slots: int) -> Tensor:
    """`row_of_slot` of a map with these slots."""
    rows = torch.full((num_slots + 1,), -1, dtype=torch.int32, device=slot_R.device)
    rows[slot_R] = torch.arange(len(slot_R), dtype=torch.int32, device=slot_R.device)
    return rows[:-1]  # padding, slot -1, wrote into the last


def most_rows(num_copies: int, num_experts: int, align: int = TILE) -> int:
    """The `room` that suffices for every routing of so many copies: all experts with one copy beyond a multiple."""
    groups = min(num_copies, num_experts)
    return (num_copies + (align - 1) * groups) // align * align
