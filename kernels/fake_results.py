"""Results of each op without their values: what `declarations` gives PyTorch to trace with.

Each function takes the arguments of an op and allocates its results. It must tell the strides of the real ones, and
those are the back end's: where scales and columns lie is asked of the layout in force on the tensor's device
(`set_layout`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8moe.kernels import device_layout
from fp8moe.kernels.fp8 import E5M6_VALUES, E5M6_WORDS, TILE, E5m6Tensor, Fp8Tensor, Rows, ceil_div
from fp8moe.kernels.message_layout import MessageLayout
from fp8moe.kernels.reference import _arithmetic as specified
from fp8moe.kernels.row_map import RowMap


@dataclass
class _Layout:
    """Whose layout casts have on a device: True for the specification's."""

    by_specification: Callable[[torch.device], bool]


_layout = _Layout(lambda device: True)


def set_layout(by_specification: Callable[[torch.device], bool]) -> None:
    """Say on which devices casts lie as the specification has them."""
    _layout.by_specification = by_specification


def cast_rows(x: Tensor, **kwargs: Any) -> list[Tensor]:
    k = x.shape[-1]
    m = x.shape[:-1].numel()
    q = (
        specified.empty_rows(m, k, x.device)
        if _layout.by_specification(x.device)
        else device_layout.empty_rows(m, k, x.device)
    )
    return [q.data.view(x.shape), q.scale.reshape(*x.shape[:-1], ceil_div(k, TILE))]


def cast_columns(x: Tensor | Fp8Tensor | E5m6Tensor, **kwargs: Any) -> list[Tensor]:
    m, k = x.shape
    empty = specified.empty_columns if _layout.by_specification(x.device) else device_layout.empty_columns
    columns = empty(m, k, x.device)
    return [columns.data, columns.scale]


def cast_blocks(w: Tensor, **kwargs: Any) -> list[Tensor]:
    shapes = (tuple(w.shape), (*w.shape[:-2], w.shape[-1], w.shape[-2]))
    return [
        part for shape in shapes for q in [device_layout.empty_blocks(shape, w.device)] for part in (q.data, q.scale)
    ]


def packed(x: Tensor, **kwargs: Any) -> list[Tensor]:
    words = x.new_empty(*x.shape[:-1], x.shape[-1] // E5M6_VALUES * E5M6_WORDS, dtype=torch.int32)
    return [words, cast_rows(x)[1]]


def product(a: Any, b: Any, *rest: Any, out_dtype: torch.dtype | None = None) -> list[Tensor]:
    first = a.data if isinstance(a, Fp8Tensor) else a
    return [torch.empty(a.shape[0], b.shape[-2], dtype=out_dtype or first.dtype, device=a.device)]


def unpacked(packed: E5m6Tensor, *, dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty(packed.shape, dtype=dtype, device=packed.device)]


def planned(ids: Tensor, num_groups: int, *rest: Any, room: int, copies: int | None = None, **_: Any) -> list[Tensor]:
    long, int_ = torch.int64, torch.int32
    slots = ids.numel() if copies is None else len(ids) * copies
    sizes = (room, long), (room, long), (num_groups + 1, int_), (num_groups, long), (slots, int_)
    return [ids.new_empty(size, dtype=dtype) for size, dtype in sizes]


def planned_message(ids: Tensor, num_peers: int, experts_per_peer: int, *, room: int, **_: Any) -> list[Tensor]:
    return planned(ids, num_peers, room=room, copies=min(ids.shape[1], num_peers))


def message(rows: Rows, row_map: RowMap, topk_ids: Tensor | None, *rest: Any, **kwargs: Any) -> list[Tensor]:
    layout = MessageLayout.of(rows, 0 if topk_ids is None else topk_ids.shape[1])
    return [torch.empty(len(row_map.source_R), layout.row_bytes, dtype=torch.uint8, device=rows.device)]


def unpacked_message(message: Tensor, row_map: RowMap, layout: MessageLayout) -> list[Tensor]:
    r = len(row_map.source_R)
    values = message.new_empty(r, layout.width, dtype=torch.float32 if layout.fp8 else layout.dtype)
    unpacked = cast_rows(values) if layout.fp8 else [values]
    return [*unpacked, message.new_empty(r, dtype=torch.float32)] if layout.topk else unpacked


def moved(x: Tensor, row_map: RowMap, **kwargs: Any) -> list[Tensor]:
    return [torch.empty(len(row_map.source_R), *x.shape[1:], dtype=x.dtype, device=x.device)]


def cast_copies(x: Rows, row_map: RowMap, **kwargs: Any) -> list[Tensor]:
    return cast_rows(torch.empty(len(row_map.source_R), x.shape[1], device=x.device))


def summed(y_R: Tensor, row_map: RowMap) -> list[Tensor]:
    return [torch.empty(row_map.num_rows, y_R.shape[1], dtype=y_R.dtype, device=y_R.device)]


def activated(gate_up: Tensor, *rest: Any, **kwargs: Any) -> list[Tensor]:
    return cast_rows(gate_up[:, : gate_up.shape[1] // 2]) + cast_rows(gate_up)


def activated_columns(cached: Fp8Tensor, weights: Tensor | None, **kwargs: Any) -> list[Tensor]:
    r, both = cached.shape
    return cast_columns(torch.empty(r, both // 2, device=cached.device))


def activation_gradients(dy: Tensor, cached: Fp8Tensor, weights: Tensor | None, **kwargs: Any) -> list[Tensor]:
    grads = cast_rows(torch.empty(cached.shape, device=cached.device)) + cast_columns(cached)
    return grads if weights is None else [*grads, weights.new_empty(weights.shape)]


def silu_mul(gate_up: Tensor, weights: Tensor | None, **kwargs: Any) -> list[Tensor]:
    return [gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)]


def silu_mul_gradients(dy: Tensor, gate_up: Tensor, weights: Tensor | None, **kwargs: Any) -> list[Tensor]:
    grads = [gate_up.new_empty(gate_up.shape)]
    return grads if weights is None else [*grads, weights.new_empty(weights.shape)]


def routed(logits_TE: Tensor, *rest: Any, topk: int, num_sequences: int, **kwargs: Any) -> list[Tensor]:
    t, e = logits_TE.shape
    ids = logits_TE.new_empty(t, topk, dtype=torch.int64)
    return [ids, *(logits_TE.new_empty(size) for size in ((t, topk), (), (num_sequences, e)))]


def d_logits(logits_TE: Tensor, *rest: Any, **kwargs: Any) -> list[Tensor]:
    return [logits_TE.new_empty(logits_TE.shape)]


def normed(
    x: Tensor, weight: Tensor, delta: Tensor | None, *, eps: float, tensor: bool, rows: bool, power_of_two: bool
) -> list[Tensor]:
    t, d = x.shape
    h, y, source = (x.new_empty(t if asked else 0, d) for asked in (delta is not None, tensor, rows))
    return [h, y, *cast_rows(source), torch.empty(t, dtype=torch.float32, device=x.device)]


def attended(q: Tensor, keys: Tensor, values: Tensor, *rest: Any, **kwargs: Any) -> list[Tensor]:
    return [q.new_empty(*q.shape[:3], values.shape[-1])]


def contiguous(x: Tensor, *rest: Any) -> list[Tensor]:
    return [x.new_empty(x.shape)]


def nothing(*args: Any, **kwargs: Any) -> list[Tensor]:
    return []


def sum(x: Tensor) -> list[Tensor]:
    return [torch.empty((), dtype=torch.float64, device=x.device)]
