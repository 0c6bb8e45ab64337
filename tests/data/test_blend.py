"""Mixtures: exact shares after any number of samples, and no sample twice or left out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8moe.data.blend import BlendedDataset, integer_weights
from fp8moe.data.packing import Batch, Window, collate
from fp8moe.errors import ConfigError


class Numbers:
    """A data set of `size` samples an epoch whose sample k is [base + k, base + k + 1]."""

    def __init__(self, base: int, size: int) -> None:
        self.base, self.size, self.fingerprint = base, size, f"numbers-{base}-{size}"

    def __len__(self) -> int:
        return self.size

    def window(self, sample_id: int) -> Window:
        return Window(np.array([self.base + sample_id, self.base + sample_id + 1]), np.array([0, 1]))

    def batch(self, sample_ids: Sequence[int]) -> Batch:
        return collate([self.window(i) for i in sample_ids], document_mask=False)


def blend(weights: Sequence[float], sizes: Sequence[int] | None = None, document_mask: bool = False) -> BlendedDataset:
    sources = [Numbers(1000 * i, size) for i, size in enumerate(sizes or [50] * len(weights))]
    return BlendedDataset(sources, weights, document_mask=document_mask)


WEIGHTS = st.lists(st.floats(0, 10, allow_subnormal=False) | st.integers(0, 5), min_size=1, max_size=6).filter(any)


@settings(deadline=None, max_examples=60)
@given(weights=WEIGHTS, start=st.sampled_from([0, 12345, 10**12]))
def test_each_sample_comes_once_and_shares_are_kept(weights: list[float], start: int) -> None:
    mixture = blend(weights)
    shares = np.array(weights) / sum(weights)
    nexts = mixture.counts(start)
    for n in range(start, start + 120):
        source, inner = mixture.locate(n)
        assert inner == nexts[source]  # the next unread sample of that source: none skipped, none repeated
        assert weights[source] > 0
        nexts[source] += 1
        assert mixture.counts(n + 1) == nexts and sum(nexts) == n + 1
        if n < 10**6:  # integer weights are within one in a million of the shares
            assert np.abs(np.array(nexts) - (n + 1) * shares).max() < max(2, len(weights))


def test_mixing_is_even_at_every_scale() -> None:
    mixture = blend([0.7, 0.2, 0.1])
    sources = [mixture.locate(n)[0] for n in range(1000)]
    for width in (10, 100):
        for start in range(0, 1000, width):
            part = sources[start : start + width]
            assert [abs(part.count(d) - width * w) <= 1 for d, w in enumerate((0.7, 0.2, 0.1))] == [True] * 3
    gaps = [b - a for a, b in pairwise(n for n, source in enumerate(sources) if source == 2)]
    assert max(gaps) <= 20


def test_batches_hold_what_the_sources_hold() -> None:
    mixture = blend([1, 3])
    batch = mixture.batch(range(40))
    expected = [mixture.sources[d].batch([k]).inputs_BS for d, k in map(mixture.locate, range(40))]
    assert torch.equal(batch.inputs_BS, torch.cat(expected)) and batch.documents_BS is None
    masked = blend([1, 3], document_mask=True).batch(range(3))
    assert masked.documents_BS is not None and (masked.labels_BS == -100).all()


def test_an_epoch_is_the_most_that_repeats_nothing() -> None:
    for weights, sizes in (
        ([1, 1], [10, 30]),
        ([0.3, 0.7], [7, 100]),
        ([2, 0, 1], [5, 1, 9]),
        ([3, 4, 5], [30, 40, 50]),
    ):
        mixture = blend(weights, sizes)
        counts = mixture.counts(len(mixture))
        assert all(count <= size for count, size in zip(counts, sizes, strict=True))
        more = mixture.counts(len(mixture) + 1)
        assert any(count > size for count, size in zip(more, sizes, strict=True))
    assert len(blend([30, 40, 50], [30, 40, 50])) == 120  # in proportion to size: all of each
    assert len(blend([1], [7])) == 7
    assert all(len(blend([1, n - 1], [1, n - 1])) == n for n in range(2, 100))  # 49 * (1 / 49) is below 1


def test_integer_weights() -> None:
    assert integer_weights([2, 0, 6.0]) == [2, 0, 6]
    small = integer_weights([1e-9, 0.5, 0.5])
    assert small[0] == 1 and small[1] == small[2] == 2**19


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "2 data sets and 1 weights"),
        ([1, -1], ">= 0"),
        ([0, 0], "all 2 weights are 0"),
        ([1, float("nan")], ">= 0"),
    ],
)
def test_impossible_weights(weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BlendedDataset([Numbers(0, 5), Numbers(1000, 5)], weights, document_mask=False)


def test_fingerprint_tells_mixtures_apart() -> None:
    assert len({blend([1, 1]).fingerprint, blend([1, 2]).fingerprint, blend([1, 1], [50, 51]).fingerprint}) == 3
