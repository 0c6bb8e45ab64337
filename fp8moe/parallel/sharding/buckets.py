"""Buckets: runs of a flat gradient buffer that are reduced in one message, and the part of each that a rank owns.

A bucket holds parameters whose gradients are finished by the same passes of a stage, a block's for example, so that it
can leave as soon as they are. Large ones are cut into several, which bounds the memory of a message. A rank owns one
contiguous part of every bucket: shards of one size, and ranges that `kernels.segments` understands. A rank that owned
whole buckets was refused: its message would be a reduction to one rank, at a quarter of the links.

Parts are cut anywhere, but never inside a matrix that must stay whole (an update by matrices needs them so). Parts are
then of uneven size, and each goes to the rank that has least so far: every rank updates nearly as much.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from torch.nn import Parameter

BUCKET = 64 * 2**20  # elements of a message at most: 256 MB in FP32
Matrices = Callable[[Parameter], Iterable[tuple[int, int]]]  # (start, stop) in a parameter's values that are not cut


@dataclass(frozen=True)
class Span:
    """Values [first, first + stop - start) of a parameter, at [start, stop) of the flat buffer."""

    parameter: Parameter
    first: int
    start: int
    stop: int

    def within(self, start: int, stop: int) -> Span | None:
        """What of it lies in [start, stop) of the buffer."""
        a, b = max(self.start, start), min(self.stop, stop)
        return Span(self.parameter, self.first + a - self.start, a, b) if a < b else None


@dataclass(frozen=True)
class Bucket:
    """spans: ascending, end to end. parts: (start, stop) in the buffer by rank of the group; together they cover it."""

    spans: tuple[Span, ...]
    parts: tuple[tuple[int, int], ...]

    def owned_by(self, rank: int) -> list[Span]:
        """The spans of a rank's part."""
        cut = (span.within(*self.parts[rank]) for span in self.spans)
        return [span for span in cut if span is not None]


def no_matrices(parameter: Parameter) -> tuple[tuple[int, int], ...]:
    """For updates that work value by value."""
    return ()


def make_buckets(
    parameters: Sequence[Parameter],
    key: Callable[[Parameter], Hashable],
    num_ranks: int,
    matrices: Matrices = no_matrices,
) -> list[Bucket]:
    """The buckets of a flat buffer that holds `parameters` end to end; those in one have one `key`.

    The same on every rank of the group.
    """
    loads = [0] * num_ranks
    buckets, start = [], 0
    for _, run in groupby(parameters, key):
        spans, whole = [], []
        stop = start
        for parameter in run:
            spans.append(Span(parameter, 0, stop, stop + parameter.numel()))
            whole += [(stop + a, stop + b) for a, b in matrices(parameter)]
            stop += parameter.numel()
        bounds = list(_cut(start, stop, -(-(stop - start) // BUCKET), whole))
        for first, last in bounds:
            inside = [span for span in (one.within(first, last) for one in spans) if span is not None]
            parts = list(_cut(first, last, num_ranks, whole))
            buckets.append(Bucket(tuple(inside), tuple(_owners(parts, loads) if whole else parts)))
        start = stop
    return buckets


def _cut(start: int, stop: int, count: int, whole: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """[start, stop) in `count` ranges of one size, as near as `whole` allows."""
    bounds = [start, *(_legal(start + (stop - start) * i // count, whole) for i in range(1, count)), stop]
    return pairwise(bounds)


def _legal(position: int, whole: Sequence[tuple[int, int]]) -> int:
    """The nearest place to `position` that is inside none of `whole`, which ascend."""
    found = bisect_right(whole, (position, position)) - 1
    if found < 0 or not whole[found][0] < position < whole[found][1]:
        return position
    a, b = whole[found]
    return a if position - a < b - position else b


def _owners(parts: Sequence[tuple[int, int]], loads: list[int]) -> list[tuple[int, int]]:
    """`parts` by rank, the largest to the rank with the least so far; `loads` grows by them."""
    ranks = sorted(range(len(loads)), key=loads.__getitem__)
    given = dict(zip(ranks, sorted(parts, key=lambda part: part[0] - part[1]), strict=True))
    for rank, (start, stop) in given.items():
        loads[rank] += stop - start
    return [given[rank] for rank in range(len(loads))]
