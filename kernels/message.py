"""Messages between ranks: which rows go to which peer, and rows packed into bytes and out of them.

A row is sent once to each peer that leads to one of its experts, with the ids and weights of all of them; the parts of
a row lie side by side (`message_layout`), so that one all-to-all carries all of them. A message a part was refused, it
pays the latency several times. Packing gathers: the rows are read where they lie and written once, in order of peer.
Unpacking scatters likewise, to where the experts read them. PyTorch's ops for the same took some hundred launches a
dispatch, most of them of a few microseconds.

Legend: N rows, S rows of a message, R rows for experts, D values of a row, K top-k.
"""

import torch
from torch import Tensor

from fp8moe.kernels import backend
from fp8moe.kernels.fp8 import Rows, ceil_div
from fp8moe.kernels.message_layout import MOST_EXPERTS, MessageLayout
from fp8moe.kernels.row_map import RowMap, check_ids

__all__ = ["MessageLayout", "pack_message", "plan_message", "unpack_message"]


def plan_message(
    topk_ids: Tensor, num_peers: int, experts_per_peer: int, *, room: int, first: int = 0, fixed: bool = False
) -> RowMap:
    """Expert ids [N, K], as `plan_rows` takes them -> the map of rows to peers; `room` is S.

    Peer p leads to experts [first + p x experts_per_peer, ...); each row goes once to each peer that leads to one of
    its experts, so the map has min(K, num_peers) copies a row, in ascending order of peer. fixed: every peer gets
    room / num_peers rows, padded, and those that do not fit are left out (tokens_per_expert counts them).
    ValueError: see `plan_rows`; and where a fixed room is no positive multiple of num_peers.
    """
    check_ids(topk_ids)
    if min(num_peers, experts_per_peer) < 1 or room < 0:
        raise ValueError(
            f"num_peers and experts_per_peer must be at least 1 and room at least 0, got {num_peers}, "
            f"{experts_per_peer} and {room}"
        )
    if fixed and (room % num_peers or not room):
        raise ValueError(
            f"room={room} must be a positive multiple of num_peers={num_peers} where messages are fixed: use "
            f"{max(1, ceil_div(room, num_peers)) * num_peers}"
        )
    op = backend.op("plan_message")
    made: RowMap = op(topk_ids, num_peers, experts_per_peer, room=room, first=first, fixed=fixed)
    return made


def pack_message(
    rows: Rows, row_map: RowMap, topk_ids: Tensor | None = None, weights: Tensor | None = None, *, sender: int = 0
) -> Tensor:
    """rows [N, D] (a tensor, or FP8 rows whose scales are powers of two) -> [S, bytes] uint8 in the map's order.

    topk_ids int64 [N, K] and weights FP32 [N, K] travel with them, and the number of the sender; or neither does.
    Padding rows are zeros. Raises ValueError for other shapes or dtypes and (on a CPU) for other scales.
    """
    if len(rows.shape) != 2 or rows.shape[0] != row_map.num_rows:
        raise ValueError(
            f"pack_message takes rows [{row_map.num_rows}, D] as the row map says, got {list(rows.shape)}: use the map "
            "of this batch"
        )
    if (topk_ids is None) != (weights is None):
        raise ValueError("topk_ids and weights travel together: give both or neither")
    if topk_ids is not None and weights is not None:
        if topk_ids.dtype is not torch.int64 or weights.dtype is not torch.float32 or topk_ids.shape != weights.shape:
            raise ValueError(
                f"topk_ids must be int64 [N, K] and weights float32 of that shape, got {topk_ids.dtype} "
                f"{list(topk_ids.shape)} and {weights.dtype} {list(weights.shape)}: cast or reshape"
            )
        if topk_ids.dim() != 2 or len(topk_ids) != row_map.num_rows:
            raise ValueError(f"topk_ids must be [{row_map.num_rows}, K], got {list(topk_ids.shape)}: reshape them")
    if not 0 <= sender < MOST_EXPERTS:
        raise ValueError(f"sender={sender} must be from 0 to {MOST_EXPERTS - 1}: it travels as int16")
    message: Tensor = backend.op("pack_message")(rows, row_map, topk_ids, weights, sender=sender)
    return message


def unpack_message(message: Tensor, row_map: RowMap, layout: MessageLayout) -> tuple[Rows, Tensor | None]:
    """message [N, bytes] uint8 -> rows [R, D] in the map's order and their routing weights [R], None without.

    Padding rows are zeros (FP8: codes zero, scales one) of weight 0. Scales arrive as the back end's GEMMs load them.
    Raises ValueError for another shape or dtype, and for a map of another top-k.
    """
    if message.dtype is not torch.uint8 or message.shape != (row_map.num_rows, layout.row_bytes):
        raise ValueError(
            f"the message must be uint8 [{row_map.num_rows}, {layout.row_bytes}] as map and layout say, got "
            f"{message.dtype} {list(message.shape)}: use those of this message"
        )
    if layout.topk and row_map.topk != layout.topk:
        raise ValueError(f"the map has {row_map.topk} copies a row, the message {layout.topk}: plan with its ids")
    unpacked: tuple[Rows, Tensor | None] = backend.op("unpack_message")(message, row_map, layout)
    return unpacked
