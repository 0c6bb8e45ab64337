"""Products whose operands lie as the kernels read them: one look-up finds a launch with its tile and descriptors.

A launch follows from how its tensors lie (`layout_of`) and from what `choose_tile` asks: the device, how many SMs may
work, whether pairs may be chosen, and who chooses (benchmarks try other tiles). By these it is kept. None stands for
operands that must be copied first, for sums that are written in another way, and for sizes of zero: they take the long
way of `launch`, which asks the same step by step. A step is little where it repeats; in a layer its code has left the
CPU's caches meanwhile and takes three times as long, and steps were a third of a product.
"""

from typing import Any

import torch
from torch import Tensor

from fp8moe.kernels import backend, tiles
from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.gluon.launch import (
    choose_tile,
    columns_launch,
    is_k_major,
    is_m_major,
    num_sms,
    pairs_allowed,
    rows_launch,
    sum_epilogue,
    typical_rows,
)
from fp8moe.kernels.gluon.launch_tokens import tokens_epilogue, tokens_launch
from fp8moe.kernels.triton.launch import Layout, Prepared, by_shapes, is_contiguous, layout_of
from fp8moe.kernels.triton.wgrad import lies_aligned


def ready_rows(op: str, a: Fp8Tensor, b: Fp8Tensor, out_dtype: torch.dtype, total: Tensor | None) -> Prepared | None:
    """`launch_rows` of these, into a new output of `out_dtype` or added into `total`; grouped where b is."""
    return _ready_rows(
        op, layout_of(a.data), layout_of(a.scale), layout_of(b.data), layout_of(b.scale), out_dtype,
        None if total is None else layout_of(total), a.data.device, backend.sm_limit(), pairs_allowed(), tiles.choose,
    )  # fmt: skip


@by_shapes
def _ready_rows(
    op: str, a: Layout, a_scale: Layout, b: Layout, b_scale: Layout, out_dtype: torch.dtype, total: Layout | None,
    device: torch.device, *_: Any,
) -> Prepared | None:  # fmt: skip
    (m, k), n, groups = a[0], b[0][-2], b[0][0] if len(b[0]) == 3 else 0
    sizes = m * b[0].numel()
    lies_well = is_k_major(*a) and is_k_major(*b) and is_m_major(*a_scale)
    lies_well = lies_well and is_contiguous(*b_scale[:2]) and b_scale[2] == 0
    if not (sizes and lies_well and (total is None or total[1][1] == 1)):
        return None
    tile = choose_tile(op, typical_rows(m, groups) if groups else m, n, k, device, groups or 1)
    out_stride = n if total is None else total[1][0]
    return rows_launch(
        m, n, k, groups, a[1][0], b[1][-2], a_scale[1][1], out_stride, out_dtype, total is not None, tile,
        num_sms(device),
    )  # fmt: skip


def ready_columns(op: str, a: Fp8Tensor, b: Fp8Tensor, total: Tensor) -> Prepared | None:
    """`launch_columns` of these, added into `total`; grouped where that is."""
    return _ready_columns(
        op, layout_of(a.data), layout_of(a.scale), layout_of(b.data), layout_of(b.scale), layout_of(total),
        a.data.device, backend.sm_limit(), pairs_allowed(), tiles.choose,
    )  # fmt: skip


@by_shapes
def _ready_columns(
    op: str, a: Layout, a_scale: Layout, b: Layout, b_scale: Layout, total: Layout, device: torch.device, *_: Any
) -> Prepared | None:  # fmt: skip
    (n, t), k, groups = a[0], b[0][0], total[0][0] if len(total[0]) == 3 else 0
    sizes = t * total[0].numel()
    vectors = all(scale[1] == (1, scale[0][0]) and scale[2] == 0 for scale in (a_scale, b_scale))
    if not (sizes and is_k_major(*a) and is_k_major(*b) and vectors and is_contiguous(*total[:2])):
        return None
    tile = choose_tile(op, n, k, typical_rows(t, groups) if groups else t, device, groups or 1)
    epilogue = sum_epilogue(*total, t // (groups or 1), tile)
    return columns_launch(n, k, t, groups, a[1][0], b[1][0], total[1][-2], epilogue, tile, num_sms(device))


def ready_tokens(op: str, dy: Tensor, x: Tensor, total: Tensor) -> Prepared | None:
    """`launch_tokens` of BF16 operands, added into `total`; grouped where that is."""
    return _ready_tokens(
        op, layout_of(dy), layout_of(x), layout_of(total), dy.dtype, x.dtype, dy.device, backend.sm_limit(),
        pairs_allowed(), tiles.choose,
    )  # fmt: skip


@by_shapes
def _ready_tokens(
    op: str, dy: Layout, x: Layout, total: Layout, dy_dtype: torch.dtype, x_dtype: torch.dtype, device: torch.device,
    *_: Any,
) -> Prepared | None:  # fmt: skip
    (t, n), k, groups = dy[0], x[0][1], total[0][0] if len(total[0]) == 3 else 0
    sizes, halves = t * total[0].numel(), dy_dtype is torch.bfloat16 and x_dtype is torch.bfloat16
    lies_well = lies_aligned(*dy, 2) and lies_aligned(*x, 2) and is_contiguous(*total[:2])
    if not (sizes and halves and lies_well):
        return None
    tile = choose_tile(op, n, k, typical_rows(t, groups) if groups else t, device, groups or 1)
    epilogue = tokens_epilogue(*total, tile)
    return tokens_launch(
        t, n, k, groups or 1, dy[1][0], x[1][0], n * total[1][-2], total[1][-2], groups > 0, epilogue, tile,
        num_sms(device),
    )  # fmt: skip
