"""Rows to experts and back. Every step is an index operation; the only sum, in `unpermute`, has a fixed order."""

from dataclasses import replace

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR, E4M3, Fp8Tensor, Rows
from fp8moe.kernels.reference.quantize import quantize_rows
from fp8moe.kernels.row_map import RowMap, ids_from

_CHUNK = 1 << 17  # values summed at a time, to stay in a core's cache


def plan_rows(
    topk_ids: Tensor,
    num_experts: int,
    *,
    align: int = 128,
    room: int | None = None,
    first: int | None = None,
    order: Tensor | None = None,
) -> RowMap:
    ids_NK = ids_from(topk_ids, first or 0, num_experts)
    if order is None:
        return _plan(ids_NK, num_experts, align, room)
    plan = _plan(ids_NK[order], num_experts, align, room)
    topk, here = plan.topk, plan.slot_R >= 0
    spare = torch.cat([order, order.new_zeros(1)])  # something to read when there are no rows
    source_R = torch.where(here, spare[plan.source_R], -1)
    slot_R = torch.where(here, source_R * topk + plan.slot_R % max(topk, 1), -1)
    rows_NK = torch.empty_like(plan.row_of_slot).view(-1, topk)
    rows_NK[order] = plan.row_of_slot.view(-1, topk)
    return replace(plan, source_R=source_R, slot_R=slot_R, row_of_slot=rows_NK.view(-1))


def _plan(topk_ids: Tensor, num_experts: int, align: int, room: int | None) -> RowMap:
    num_rows, topk = topk_ids.shape
    flat = topk_ids.reshape(-1)
    expert = torch.where(flat < 0, num_experts, flat)  # copies that are not here sort to the end
    sorted_expert, slot = torch.sort(expert, stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, expert, torch.ones_like(expert))
    padded = (counts + (align - 1)) // align * align
    padded[num_experts] = 0
    start = torch.cumsum(padded, 0) - padded  # of the group in the padded rows; of "not here": R
    first = torch.cumsum(counts, 0) - counts  # of the group in the sorted copies
    r = int(start[num_experts]) if room is None else room
    position = start[sorted_expert] + torch.arange(flat.numel(), device=flat.device) - first[sorted_expert]
    # Copies that are not here land past the end, in room that is cut off; so do those that have no room.
    position = torch.where(sorted_expert == num_experts, r, position).clamp(max=r)
    slot_R = torch.full((r + 1,), -1, dtype=torch.int64, device=flat.device)
    slot_R = slot_R.scatter_(0, position, slot)[:r]
    row_of_slot = torch.empty_like(position).scatter_(0, slot, position.masked_fill(position == r, -1))
    return RowMap(
        source_R=torch.where(slot_R < 0, -1, slot_R // max(topk, 1)),
        slot_R=slot_R,
        group_offsets=start.clamp(max=r).to(torch.int32),
        tokens_per_expert=counts[:num_experts],
        row_of_slot=row_of_slot.to(torch.int32),
        num_rows=num_rows,
        topk=topk,
    )


def permute(x: Rows, row_map: RowMap) -> Rows:
    # One spare row at the end is what padding reads.
    index = torch.where(row_map.source_R < 0, row_map.num_rows, row_map.source_R)
    if isinstance(x, Fp8Tensor):
        codes = _take(x.data.view(torch.uint8), index, 0).view(E4M3)
        return Fp8Tensor(codes, _take(x.scale, index, 1), x.tile)
    return _take(x, index, 0)


def permute_quantize(
    x: Tensor, row_map: RowMap, *, amax_floor: float = ACTIVATION_AMAX_FLOOR, power_of_two: bool = False
) -> Fp8Tensor:
    copies = permute(quantize_rows(x, amax_floor=amax_floor, power_of_two=power_of_two), row_map)
    assert isinstance(copies, Fp8Tensor)
    return copies


def unpermute(y_R: Tensor, row_map: RowMap, *, out: Tensor | None = None) -> Tensor:
    n, topk = row_map.num_rows, row_map.topk
    r, d = y_R.shape
    row_NK = row_map.row_of_slot.masked_fill(row_map.row_of_slot < 0, r).view(n, topk)  # r is a spare row of zeros
    spare = torch.cat([y_R, y_R.new_zeros(1, d)])
    if out is None:
        out = torch.empty(n, d, dtype=y_R.dtype, device=y_R.device)
    step = max(1, _CHUNK // max(d, 1))
    for start in range(0, n, step):
        row_mK = row_NK[start : start + step]
        total = torch.zeros(row_mK.shape[0], d, dtype=torch.float32, device=y_R.device)
        for row_m in row_mK.unbind(1):
            total += spare.index_select(0, row_m).float()
        out[start : start + step] = total
    return out


def _take(x: Tensor, index: Tensor, fill: int) -> Tensor:
    """Rows `index` of x [N, ...] with one row of `fill` behind it."""
    return torch.cat([x, x.new_full((1, *x.shape[1:]), fill)]).index_select(0, index)
