"""Rows to experts and back: plan once a batch, permute, unpermute.

A plan lists, for each of the R rows an expert sees, which row of x and which slot of the top-k it came from. Rows are
sorted by expert, then by row of x, and each group is padded to a multiple of 128 so that no GEMM tile and no scale
along tokens covers two experts. Padding rows are zeros.

`unpermute` is the transpose of `permute`: a plain sum of a row's copies (the routing weight was applied in SwiGLU),
taken in FP32 in the order of the slots, so that the result doesn't depend on where the experts live. An atomic scatter
add was refused: its order isn't fixed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.kernels import backend
from fp8moe.kernels.fp8 import ROW_TILE, Fp8Tensor

Rows = Tensor | Fp8Tensor


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


def plan_rows(topk_ids: Tensor, num_experts: int, *, align: int = 128, room: int | None = None) -> RowMap:
    """topk_ids int64 [N, K], -1 for a copy that is not here -> the map; R = the padded groups together.

    Waits for the device once, for R, unless the caller gives `room` = R: rows behind the last group are padding, and
    groups that reach past it are cut off there (the caller sees that in tokens_per_expert). Raises ValueError for
    another dtype or shape, and (on a CPU, where it costs nothing) for an id past num_experts.
    """
    if topk_ids.dim() != 2 or topk_ids.dtype is not torch.int64:
        raise ValueError(f"topk_ids are int64 [N, K], not {topk_ids.dtype} {list(topk_ids.shape)}: cast or reshape")
    if align < 1:
        raise ValueError(f"groups are padded to a multiple of at least 1, not {align}: use 128 for FP8, 1 otherwise")
    if topk_ids.device.type == "cpu" and topk_ids.numel() and int(topk_ids.max()) >= num_experts:
        raise ValueError(f"expert ids end at {num_experts - 1}, topk_ids hold {int(topk_ids.max())}: renumber")
    return backend.op("plan_rows")(topk_ids, num_experts, align=align, room=room)


def permute(x: Rows, row_map: RowMap) -> Rows:
    """x [N, D] (a tensor, also [N], or an Fp8Tensor of 1x128 tiles) -> its copies [R, D] in the map's order.

    Padding rows are zeros (FP8: codes zero, scales one). Raises ValueError where x has another number of rows.
    """
    if isinstance(x, Fp8Tensor) and (x.tile != ROW_TILE or len(x.shape) != 2):
        raise ValueError(f"permute takes FP8 rows [N, D] of {ROW_TILE} tiles, not {list(x.shape)} of {x.tile}: cast")
    _check_rows(x.shape[0], row_map.num_rows, "num_rows")
    return backend.op("permute")(x, row_map)


def unpermute(y_R: Tensor, row_map: RowMap) -> Tensor:
    """y [R, D] -> [N, D]: the sum of each row's copies in FP32, in slot order, in y's dtype; zero for a row without.

    What padding rows hold is not read. Raises ValueError where y has another number of rows.
    """
    _check_rows(y_R.shape[0], row_map.slot_R.shape[0], "R")
    return backend.op("unpermute")(y_R, row_map)


def _check_rows(rows: int, expected: int, name: str) -> None:
    if rows != expected:
        raise ValueError(f"the map has {name}={expected}, the tensor {rows} rows: use the map of this batch")
