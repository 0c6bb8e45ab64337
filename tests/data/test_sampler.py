"""One stream of samples for any ranks, batch sizes and resumes; mixtures with exact shares and no sample twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8moe.data.indexed import IndexedDataset
from fp8moe.data.packing import Batch, PackedDataset, Window, collate, every_document
from fp8moe.data.sampler import BlendedDataset, Sampler, integer_weights, rank_slice
from fp8moe.errors import ConfigError, DataError

SCHEDULE = [4, 4, 8, 8, 12, 16, 16, 24]  # global batch sizes: 92 samples, over several epochs of the set below


@pytest.fixture
def dataset(make_tokens: Callable[..., IndexedDataset], tmp_path: Path) -> PackedDataset:
    random = np.random.RandomState(0)
    source = make_tokens([random.randint(0, 1000, random.randint(1, 40)) for _ in range(30)])
    options = {"seq_len": 16, "seed": 5, "vocab_size": 1000, "document_mask": False, "cache": tmp_path / "c"}
    return PackedDataset(source, every_document(source), **options)  # type: ignore[arg-type]


def stream(dataset: PackedDataset, sampler: Sampler, ranks: int, batches: list[int]) -> torch.Tensor:
    """All tokens in the order of the global stream, each rank fetching its own share."""
    rows = []
    for size in batches:
        ids = sampler.next_indices(size)
        rows += [dataset.batch(rank_slice(ids, rank, ranks)).inputs_BS for rank in range(ranks)]
    return torch.cat(rows)


def test_the_stream_is_the_same_for_any_ranks_and_batch_sizes(dataset: PackedDataset) -> None:
    assert len(dataset) < sum(SCHEDULE) / 2  # more than one epoch is read
    expected = torch.cat([dataset.batch([n]).inputs_BS for n in range(92)])
    for ranks in (1, 2, 4):
        assert torch.equal(stream(dataset, Sampler(len(dataset), 5), ranks, SCHEDULE), expected)
    assert torch.equal(stream(dataset, Sampler(len(dataset), 5), 2, [2] * 46), expected)


@pytest.mark.parametrize("steps", range(len(SCHEDULE) + 1))
def test_a_resume_in_the_middle_changes_nothing(dataset: PackedDataset, steps: int) -> None:
    before = Sampler(len(dataset), 5)
    first = stream(dataset, before, 4, SCHEDULE[:steps]) if steps else torch.empty(0, 16, dtype=torch.int64)
    state = json.loads(json.dumps(before.state_dict()))
    assert state == {"seed": 5, "consumed": sum(SCHEDULE[:steps])}
    after = Sampler(len(dataset), 5)
    after.load_state_dict(state)
    rest = stream(dataset, after, 1, SCHEDULE[steps:]) if steps < len(SCHEDULE) else first[:0]
    assert torch.equal(torch.cat([first, rest]), stream(dataset, Sampler(len(dataset), 5), 2, SCHEDULE))


def test_epochs() -> None:
    sampler = Sampler(10, seed=0)
    epochs = []
    for _ in range(6):
        epochs.append(sampler.epoch)
        sampler.next_indices(4)
    assert epochs == [0, 0, 0, 1, 1, 2]
    assert Sampler(10, 0, consumed=10**12).next_indices(2) == [10**12, 10**12 + 1]
    smallest = Sampler(1, seed=0)
    assert [smallest.next_indices(1), smallest.next_indices(1), smallest.epoch] == [[0], [1], 2]


def test_impossible_requests() -> None:
    with pytest.raises(DataError, match="got 0"):
        Sampler(0, seed=0)
    with pytest.raises(ConfigError, match="consumed=-1"):
        Sampler(3, seed=0, consumed=-1)
    with pytest.raises(ConfigError, match="global_batch=0"):
        Sampler(3, seed=0).next_indices(0)
    with pytest.raises(ConfigError, match=r"seed 1 and this run has seed 2: use seed=1"):
        Sampler(3, seed=2).load_state_dict({"seed": 1, "consumed": 0})
    with pytest.raises(ConfigError, match="consumed=-4 samples"):
        Sampler(3, seed=1).load_state_dict({"seed": 1, "consumed": -4})
    with pytest.raises(ConfigError, match="4 ranks do not divide a global batch of 10 samples: use 8 or 12"):
        rank_slice(list(range(10)), 0, 4)
    with pytest.raises(ConfigError, match="4 ranks do not divide a global batch of 3 samples: use 4"):
        rank_slice(list(range(3)), 0, 4)


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
    assert torch.equal(batch.inputs_BS, torch.cat(expected)) and batch.document_lengths is None
    masked = blend([1, 3], document_mask=True).batch(range(3))
    assert masked.document_lengths is not None and (masked.labels_BS == -100).all()


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
    assert len(blend([1], [7])) == 7 and len(blend([1], [0])) == 0 and len(blend([1, 1], [0, 5])) == 1
    assert all(len(blend([1, n - 1], [1, n - 1])) == n for n in range(2, 100))  # 49 * (1 / 49) is below 1


def test_integer_weights() -> None:
    assert integer_weights([2, 0, 6.0]) == [2, 0, 6]
    assert integer_weights([0.5, 1.5, 0]) == [2**18, 3 * 2**18, 0]
    small = integer_weights([1e-9, 0.5, 0.5])
    assert small[0] == 1 and small[1] == small[2] == 2**19


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "2 data sets have 1 weights"),
        ([1, -1], ">= 0"),
        ([0, 0], "the 2 weights of data sets are all 0"),
        ([1, float("nan")], ">= 0"),
    ],
)
def test_impossible_weights(weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BlendedDataset([Numbers(0, 5), Numbers(1000, 5)], weights, document_mask=False)


def test_fingerprint_tells_mixtures_apart() -> None:
    assert len({blend([1, 1]).fingerprint, blend([1, 2]).fingerprint, blend([1, 1], [50, 51]).fingerprint}) == 3
