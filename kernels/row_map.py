"""The plan of a permutation: for each of the R rows that experts see, which row of x it copies and for which slot.

It stands apart from the ops of `permute` because their implementations and their registration name it too.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowMap:
    """Where the R permuted rows come from.

    source_R: int64, row of x, -1 for padding. slot_R: int64, n * topk + k of the copy, -1 for padding.
    group_offsets: int32 [E+1], rows of expert e are [group_offsets[e], group_offsets[e+1]). tokens_per_expert: int64
    [E], without padding. num_rows: rows of x. topk: copies a row of x may have.
    """

    source_R: Tensor
    slot_R: Tensor
    group_offsets: Tensor
    tokens_per_expert: Tensor
    num_rows: int
    topk: int
