"""Instructions that take bits or bytes out of 32 and 64 of them: bfe, prmt, shf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def extract(a: Any, start: Any, length: Any) -> Any:
    """bfe: `length` bits from `start` on, the sign of the topmost spread where the type has one."""
    bits, wide = 8 * a.dtype.itemsize, np.int64 if a.dtype.kind == "i" else np.uint64
    first, count = (int(x) if isinstance(x, np.generic) else bits + 1 for x in (start, length))
    if count and first + count <= bits:  # literals, as nearly all are
        return (a << a.dtype.type(bits - first - count)) >> a.dtype.type(bits - count)
    start, length = np.minimum(start.astype(np.int64), 255), np.minimum(length.astype(np.int64), bits)
    value = a.astype(wide) >> np.minimum(start, 63).astype(wide)
    lift = (64 - length).astype(wide)
    return np.where(length == 0, 0, (value << np.minimum(lift, 63)) >> np.minimum(lift, 63)).astype(a.dtype)


def permute_bytes(a: Any, b: Any, selector: Any) -> Any:
    """prmt: each byte of the result is one of eight, or the sign of one spread over it."""
    if isinstance(selector, np.generic) and not int(selector) & 0x8888:  # as nearly all are
        return _chosen_bytes(a, b, int(selector))
    pool = np.stack(
        [np.broadcast_to(x, np.broadcast(a, b).shape).copy().view(np.uint8).reshape(-1, 4) for x in (a, b)], 1
    )
    pool, out = pool.reshape(-1, 8), np.zeros((pool.shape[0], 4), np.uint8)
    lane = np.arange(out.shape[0])
    for i in range(4):
        nibble = np.broadcast_to((selector >> np.uint32(4 * i)) & np.uint32(15), lane.shape).astype(np.int64)
        byte = pool[lane, nibble & 7]
        out[:, i] = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
    return out.reshape(-1).view(np.uint32)


def _chosen_bytes(a: Any, b: Any, selector: int) -> Any:
    """prmt where the same bytes are chosen of all lanes, and no sign."""
    pair, found = b.astype(np.uint64) << np.uint64(32) | a, np.uint32(0)
    for i in range(4):
        byte = pair >> np.uint64(8 * (selector >> 4 * i & 7)) & np.uint64(0xFF)
        found = found | byte << np.uint64(8 * i)
    return found.astype(np.uint32)


def funnel(left: bool, clamp: bool) -> Callable[[Any, Any, Any], Any]:
    def shift(low: Any, high: Any, count: Any) -> Any:
        count = np.minimum(count, 32) if clamp else count & np.uint32(31)
        pair = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
        count = np.asarray(count).astype(np.uint64)
        moved = (pair << count) >> np.uint64(32) if left else pair >> count
        return moved.astype(np.uint32)

    return shift
