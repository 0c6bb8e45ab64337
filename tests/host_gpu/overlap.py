"""What may run under each message, in what the device wrote down: the products of the main stream that nothing orders
against it. A wait of the host or of the stream in the wrong place takes it away, and no result shows that.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable

from tests.host_gpu.races import WRITE, Line, Replay

MAIN = 0  # the stream of compute
MESSAGE, PRODUCT = "all_to_all_single", "mm"  # gemm, grouped_mm, mm, bmm, addmm
LEAST = 1024  # bytes: what is smaller announces counts, or opens a connection


def products_under_messages(log: Iterable[Line]) -> list[int]:
    """For each message that the main stream has waited for, the number of products between its start and that wait."""
    replay, products, found = Replay(), [], []
    under_way: list[tuple[int, int, int]] = []  # stream and time of a message, time of the main stream when it began
    for line in log:
        replay.line(line)
        kind, stream, first, last, op = line
        if kind != WRITE:
            continue
        if op == MESSAGE and last - first >= LEAST:
            under_way.append((stream, replay.time(stream, stream), replay.time(stream, MAIN)))
        if stream != MAIN:
            continue
        now = replay.time(MAIN, MAIN)
        for one in [one for one in under_way if replay.time(MAIN, one[0]) >= one[1]]:
            under_way.remove(one)
            found.append(bisect.bisect_left(products, now) - bisect.bisect_right(products, one[2]))
        if PRODUCT in op:
            products.append(now)
    return found
