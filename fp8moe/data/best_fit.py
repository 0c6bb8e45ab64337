"""Document-aware packing: whole documents put into samples of seq_len + 1 by best fit decreasing.

Documents go into samples from the longest to the shortest, each into the fullest sample that still has room for it,
else into a new one (source: "Fewer Truncations Improve Language Modeling", arXiv 2404.10830). A document longer than a
sample is cut into full samples and a rest, which is placed like a document. So every token stands in exactly one
sample, no document is cut that fits into one, and what stays free at the end of a sample is padding: 0 to a few percent
of the tokens, less the more short documents there are. A sample's first token, and of a cut document the first of each
part, is not predicted.

Lengths are placed by whole arrays: all documents of a length at once into all samples of a room, which gives what
placing one after the other gives, in time that grows with the number of different lengths instead of that of documents.
Which documents of equal length share a sample, and their order in it, are random by epoch.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray


def best_fit(sizes: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], int]:
    """(number of the bin of each of `sizes`, number of bins); sizes are int64 from 1 to `capacity`."""
    bins_of = np.empty(len(sizes), dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    with_room: dict[int, list[NDArray[np.int64]]] = {}
    rooms: list[int] = []  # the keys, ascending
    num_bins = done = 0

    def keep(room: int, bins: NDArray[np.int64]) -> None:
        if room == 0 or not len(bins):
            return
        if room not in with_room:
            insort(rooms, room)
        with_room.setdefault(room, []).append(bins)

    values, counts = np.unique(sizes, return_counts=True)
    for size, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        left = count
        while left:
            at = bisect_left(rooms, size)
            if at < len(rooms):
                room = rooms.pop(at)
                bins = np.concatenate(with_room.pop(room))
            else:
                room, new = capacity, -(-left // (capacity // size))
                bins = np.arange(num_bins, num_bins + new)
                num_bins += new
            each = room // size
            placed = min(left, each * len(bins))
            bins_of[order[done : done + placed]] = np.repeat(bins, each)[:placed]
            full, rest = divmod(placed, each)
            keep(room - each * size, bins[:full])
            if rest:
                keep(room - rest * size, bins[full : full + 1])
            keep(room, bins[full + bool(rest) :])
            left, done = left - placed, done + placed
    return bins_of, num_bins
