"""Buckets: what is in one, how large it gets, who owns which part, and what is never cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter

from fp8moe.parallel.sharding import buckets
from fp8moe.parallel.sharding.buckets import Bucket, make_buckets


def parameters(*sizes: int) -> list[Parameter]:
    return [Parameter(torch.empty(size, device="meta")) for size in sizes]


def bounds(bucket: Bucket) -> tuple[int, int]:
    return bucket.spans[0].start, bucket.spans[-1].stop


def test_neighbours_of_one_key_share_a_bucket_and_every_rank_owns_a_part() -> None:
    made = parameters(5, 7, 4, 8, 12)
    key = dict(zip(made, "aabba", strict=True)).__getitem__
    first, second, third = make_buckets(made, key, 4)
    assert [bounds(one) for one in (first, second, third)] == [(0, 12), (12, 24), (24, 36)]
    assert first.parts == ((0, 3), (3, 6), (6, 9), (9, 12)) and second.parts[3] == (21, 24)
    (a, b) = first.owned_by(1)
    assert (a.parameter, a.first, a.start, a.stop) == (made[0], 3, 3, 5)
    assert (b.parameter, b.first, b.start, b.stop) == (made[1], 0, 5, 6)
    (c,) = third.owned_by(2)
    assert (c.parameter, c.first, c.start, c.stop) == (made[4], 6, 30, 33)


def test_a_large_one_is_cut_into_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "BUCKET", 10)
    made = parameters(25, 3)
    cut = make_buckets(made, lambda p: 0, 2)
    assert [bounds(one) for one in cut] == [(0, 9), (9, 18), (18, 28)]
    assert [(s.parameter, s.first) for s in cut[2].spans] == [(made[0], 18), (made[1], 0)]


def test_matrices_stay_whole_and_the_load_is_even() -> None:
    """Six matrices of 8 and a vector over two ranks: three each, the vector's values with the lighter."""
    made = parameters(48, 10)
    matrices = [(i, i + 8) for i in range(0, 48, 8)]
    one, other = make_buckets(made, {made[0]: 0, made[1]: 1}.__getitem__, 2, lambda p: matrices if p is made[0] else ())
    assert sorted(one.parts) == [(0, 24), (24, 48)] and other.parts == ((48, 53), (53, 58))
    uneven = make_buckets(parameters(24, 24, 24), id, 2, lambda p: [(0, 16), (16, 24)])
    owned = [sum(b - a for a, b in (one.parts[rank] for one in uneven)) for rank in range(2)]
    assert sorted(owned) == [32, 40], "the larger part goes to the rank with less so far"


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 7), st.data())
def test_every_value_has_one_owner_and_no_matrix_two(sizes: list[int], num_ranks: int, data: st.DataObject) -> None:
    made = parameters(*sizes)
    whole = {p: [] if data.draw(st.booleans()) else [(0, p.numel() // 2), (p.numel() // 2, p.numel())] for p in made}
    keys = {p: data.draw(st.integers(0, 2)) for p in made}
    owner = [None] * sum(sizes)
    starts = {p: sum(sizes[:i]) for i, p in enumerate(made)}
    for bucket in make_buckets(made, keys.__getitem__, num_ranks, whole.__getitem__):
        assert len({keys[span.parameter] for span in bucket.spans}) == 1
        for rank in range(num_ranks):
            for span in bucket.owned_by(rank):
                assert span.start - span.first == starts[span.parameter]
                for i in range(span.start, span.stop):
                    assert owner[i] is None
                    owner[i] = rank
    assert None not in owner
    for p, matrices in whole.items():
        for a, b in matrices:
            assert len(set(owner[starts[p] + a : starts[p] + b])) <= 1
