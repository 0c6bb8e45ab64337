"""Messages between ranks, by index operations and views of bytes."""

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import Fp8Tensor, Rows
from fp8moe.kernels.message_layout import MessageLayout, as_bytes, exponents, scales
from fp8moe.kernels.reference.permute import permute, plan_rows
from fp8moe.kernels.row_map import RowMap, ids_from, invert


def plan_message(
    topk_ids: Tensor, num_peers: int, experts_per_peer: int, *, room: int, first: int = 0, fixed: bool = False
) -> RowMap:
    ids_NK = ids_from(topk_ids, first, num_peers * experts_per_peer)
    peer_NK = torch.where(ids_NK < 0, num_peers, ids_NK // experts_per_peer).sort(dim=1).values
    again_NK = torch.zeros_like(peer_NK, dtype=torch.bool)
    again_NK[:, 1:] = peer_NK[:, 1:] == peer_NK[:, :-1]
    peer_NK = peer_NK.masked_fill(again_NK, num_peers).sort(dim=1).values[:, :num_peers]
    peer_NK = peer_NK.masked_fill(peer_NK == num_peers, -1)
    if not fixed:
        return plan_rows(peer_NK, num_peers, align=1, room=room)
    return _spread(plan_rows(peer_NK, num_peers, align=1, room=peer_NK.numel()), room // num_peers)


def _spread(dense: RowMap, room: int) -> RowMap:
    """The map with `room` rows for every group: padding behind short ones, long ones cut."""
    offsets = dense.group_offsets.long()
    position = offsets[:-1, None] + torch.arange(room, device=offsets.device)
    empty = (position >= offsets[1:, None]).flatten()
    slot_R = torch.cat([dense.slot_R, dense.slot_R.new_full((1,), -1)])
    slot_R = slot_R[position.flatten().clamp(max=len(dense.slot_R))].masked_fill(empty, -1)
    return RowMap(
        source_R=torch.where(slot_R < 0, -1, slot_R // max(dense.topk, 1)),
        slot_R=slot_R,
        group_offsets=torch.arange(0, len(offsets) * room, room, device=offsets.device, dtype=torch.int32),
        tokens_per_expert=dense.tokens_per_expert,
        row_of_slot=invert(slot_R, dense.num_rows * dense.topk),
        num_rows=dense.num_rows,
        topk=dense.topk,
    )


def pack_message(
    rows: Rows, row_map: RowMap, topk_ids: Tensor | None = None, weights: Tensor | None = None, *, sender: int = 0
) -> Tensor:
    layout = MessageLayout.of(rows, 0 if topk_ids is None else topk_ids.shape[1])
    data = rows.data if isinstance(rows, Fp8Tensor) else rows
    parts = [as_bytes(data)]
    if topk_ids is not None and weights is not None:
        parts += [data.new_zeros(len(data), layout.weights - layout.body, dtype=torch.uint8), as_bytes(weights)]
        senders = torch.full((len(data), 1), ~sender, dtype=torch.int16, device=data.device)
        parts += [as_bytes(~topk_ids.to(torch.int16)), as_bytes(senders)]
    if isinstance(rows, Fp8Tensor):
        parts.append(exponents(rows.scale))
    padding = layout.row_bytes - sum(part.shape[1] for part in parts)
    parts.append(data.new_zeros(len(data), padding, dtype=torch.uint8))
    packed = permute(torch.cat(parts, dim=1), row_map)
    assert isinstance(packed, Tensor)
    return packed


def unpack_message(message: Tensor, row_map: RowMap, layout: MessageLayout) -> tuple[Rows, Tensor | None]:
    rows: Rows = message.view(layout.dtype)[:, : layout.width]
    if isinstance(rows, Tensor) and layout.fp8:
        tiles = message[:, layout.exponents : layout.exponents + layout.num_tiles]
        rows = Fp8Tensor(rows, scales(tiles))
    if not layout.topk:
        return permute(rows, row_map), None
    weights_NK = message[:, layout.weights : layout.ids].contiguous().view(torch.float32)
    weights_R = permute(weights_NK.reshape(-1), row_map.of_slots())
    assert isinstance(weights_R, Tensor)
    return permute(rows, row_map), weights_R
