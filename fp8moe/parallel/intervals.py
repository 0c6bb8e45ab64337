"""Sets of times as sorted, disjoint intervals (start, end): unions, overlaps, what is left."""

from __future__ import annotations

from collections.abc import Iterable

Intervals = list[tuple[float, float]]


def union(parts: Iterable[tuple[float, float]]) -> Intervals:
    """All times in any of `parts`."""
    merged: Intervals = []
    for start, end in sorted(parts):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        elif end > start:
            merged.append((start, end))
    return merged


def overlap(a: Intervals, b: Intervals) -> Intervals:
    """All times in both; `a` and `b` are unions."""
    common, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            common.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return common


def length(parts: Intervals) -> float:
    """The time that a union takes."""
    return sum(end - start for start, end in parts)


def without(a: Intervals, b: Intervals) -> float:
    """The time in `a` and not in `b`."""
    return length(a) - length(overlap(a, b))
