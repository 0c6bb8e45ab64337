"""Rows to experts and back: plan once a batch, permute, unpermute.

A plan lists, for each of the R rows an expert sees, which row of x and which slot of the top-k it came from. Rows are
sorted by expert, then by row of x, and each group is padded to a multiple of 128 so that no GEMM tile and no scale
along tokens covers two experts. Padding rows are zeros.

`unpermute` is the transpose of `permute`: a plain sum of a row's copies (the routing weight was applied in SwiGLU),
taken in FP32 in the order of the slots, so that the result doesn't depend on where the experts live. An atomic scatter
add was refused: its order isn't fixed.

`permute_quantize` casts on the way: each row is quantized once, however many copies of it are written. It is for rows
that nobody else wants in FP8; where the shared expert reads the same cast, `quantize_rows` and `permute` share it.
"""

import torch
from torch import Tensor

from fp8moe.kernels import backend
from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR, ROW_TILE, Fp8Tensor, Rows, check_sizes
from fp8moe.kernels.quantize import observers, quantize_rows
from fp8moe.kernels.row_map import RowMap, check_ids

__all__ = ["RowMap", "Rows", "permute", "permute_quantize", "plan_rows", "unpermute"]

_SUMMED = (torch.bfloat16, torch.float32)


def plan_rows(
    topk_ids: Tensor,
    num_experts: int,
    *,
    align: int = 128,
    room: int | None = None,
    first: int | None = None,
    order: Tensor | None = None,
) -> RowMap:
    """topk_ids [N, K] -> the map; R = the padded groups together.

    Ids are int64, negative for a copy that is not here, or int16 as in a message, inverted. first: the first of the
    num_experts; other ids are not here. order int64 [N]: the groups hold rows in this order, a permutation of them.

    Waits for the device once, for R, unless the caller gives `room` = R: rows behind the last group are padding, and
    groups that reach past it are cut off there (the caller sees that in tokens_per_expert). Raises ValueError for
    another dtype or shape, and (on a CPU, where it costs nothing) for an id past num_experts where `first` is None.
    """
    check_ids(topk_ids)
    if align < 1:
        raise ValueError(f"align must be at least 1, got {align}: use 128 for FP8, 1 otherwise")
    if num_experts < 1 or (room is not None and room < 0):
        raise ValueError(f"num_experts must be at least 1 and room at least 0, got {num_experts} and {room}")
    if order is not None and (order.dtype is not torch.int64 or order.shape != topk_ids.shape[:1]):
        raise ValueError(
            f"order must be int64 [{len(topk_ids)}], a number a row of topk_ids, got {order.dtype} {list(order.shape)}"
        )
    readable = first is None and topk_ids.dtype is torch.int64 and _read_for_free(topk_ids)
    if readable and topk_ids.numel() and int(topk_ids.max()) >= num_experts:
        raise ValueError(
            f"topk_ids must be below num_experts={num_experts}, got {int(topk_ids.max())}: renumber the experts"
        )
    op = backend.op("plan_rows")
    made: RowMap = op(topk_ids, num_experts, align=align, room=room, first=first, order=order)
    return made


def permute(x: Rows, row_map: RowMap) -> Rows:
    """x [N, D] (a tensor, also [N], or an Fp8Tensor of 1x128 tiles) -> its copies [R, D] in the map's order.

    Padding rows are zeros (FP8: codes zero, scales one). Scales of FP8 rows arrive as the back end's GEMMs load them.
    Raises ValueError where x has another number of rows, lies on another device, or is FP8 of another tile.
    """
    if isinstance(x, Fp8Tensor) and (x.tile != ROW_TILE or len(x.shape) != 2):
        raise ValueError(f"permute takes FP8 rows [N, D] of {ROW_TILE} tiles, not {list(x.shape)} of {x.tile}: cast")
    if len(x.shape) == 0:
        raise ValueError("permute takes rows [N, D] or numbers [N], not one number: reshape it to [1]")
    _check_rows(x.shape[0], row_map.num_rows, "num_rows")
    _check_device(x.device, row_map)
    return backend.op("permute")(x, row_map)


def permute_quantize(
    x: Tensor, row_map: RowMap, *, amax_floor: float = ACTIVATION_AMAX_FLOOR, power_of_two: bool = False
) -> Fp8Tensor:
    """x [N, D] BF16 or FP32, D a multiple of 16 -> FP8 rows [R, D]: `permute(quantize_rows(x), row_map)`, bit for bit.

    Raises ValueError for another dtype or shape, another number of rows or another device.
    """
    if x.dtype not in _SUMMED or x.dim() != 2:
        raise ValueError(
            f"permute_quantize takes BF16 or FP32 rows [N, D], not {x.dtype} {list(x.shape)}: cast or reshape"
        )
    check_sizes(D=x.shape[1])
    _check_rows(x.shape[0], row_map.num_rows, "num_rows")
    _check_device(x.device, row_map)
    rows: Fp8Tensor = backend.op("permute_quantize")(x, row_map, amax_floor=amax_floor, power_of_two=power_of_two)
    if observers:  # every row counts once, as its cast does, not its copies
        quantize_rows(x, amax_floor=amax_floor, power_of_two=power_of_two)
    return rows


def unpermute(y_R: Tensor, row_map: RowMap, *, out: Tensor | None = None) -> Tensor:
    """y [R, D] BF16 or FP32 -> [N, D]: the sum of each row's copies in FP32, in slot order, in y's dtype; zero for a
    row without. out: where it goes, rows that may lie apart.

    What padding rows hold is not read. Raises ValueError for another dtype or shape, or another device.
    """
    if y_R.dtype not in _SUMMED or y_R.dim() != 2:
        raise ValueError(f"unpermute sums BF16 or FP32 rows [R, D], not {y_R.dtype} {list(y_R.shape)}: cast or reshape")
    _check_rows(y_R.shape[0], row_map.slot_R.shape[0], "R")
    _check_device(y_R.device, row_map)
    if out is not None:
        expected = (row_map.num_rows, y_R.shape[1])
        if out.dtype is not y_R.dtype or out.shape != expected or (out.numel() and out.stride(1) != 1):
            raise ValueError(
                f"out must be {y_R.dtype} {list(expected)} with values side by side, got {out.dtype} {list(out.shape)} "
                f"of strides {out.stride()}: make it so"
            )
    total: Tensor = backend.op("unpermute")(y_R, row_map, out=out)
    return total


def _read_for_free(numbers: Tensor) -> bool:
    return not torch.compiler.is_compiling() and type(numbers) is Tensor and numbers.device.type == "cpu"


def _check_rows(rows: int, expected: int, name: str) -> None:
    if rows != expected:
        raise ValueError(
            f"the tensor must have {name}={expected} rows as the row map says, got {rows}: use the map of this batch"
        )


def _check_device(device: torch.device, row_map: RowMap) -> None:
    if device != row_map.slot_R.device:
        raise ValueError(f"the map lies on {row_map.slot_R.device}, the rows on {device}: move one of them")
