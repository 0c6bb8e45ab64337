"""Best fit decreasing against placing one document after the other; whole documents in samples, each token once."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fp8moe.data.best_fit import best_fit
from fp8moe.data.indexed import IndexedDataset, IndexedWriter
from fp8moe.data.packing import PackedDataset, Window, collate, every_document
from fp8moe.errors import DataError


def one_by_one(sizes: list[int], capacity: int) -> list[list[int]]:
    """Best fit decreasing by its definition."""
    bins: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        fitting = [one for one in bins if sum(one) + size <= capacity]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            bins.append([size])
    return bins


@settings(deadline=None, max_examples=150)
@given(capacity=st.integers(1, 40), data=st.data())
def test_bins_are_those_of_placing_one_after_the_other(capacity: int, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=80))
    bins_of, num_bins = best_fit(np.array(sizes, dtype=np.int64), capacity)
    filled = np.bincount(bins_of, weights=sizes, minlength=num_bins)
    # Of bins that are equally full any may take a document, so what each holds may differ.
    assert sorted(filled.tolist()) == sorted(map(sum, one_by_one(sizes, capacity)))


def test_many_documents_take_little_time_and_padding() -> None:
    """200,000 documents of some 600 tokens: a loop over documents and samples would take minutes."""
    sizes = np.minimum(np.random.RandomState(0).lognormal(6, 1, 200_000).astype(np.int64) + 1, 4097)
    bins_of, num_bins = best_fit(sizes, 4097)
    filled = np.bincount(bins_of, weights=sizes, minlength=num_bins)
    assert filled.max() <= 4097 and filled.min() > 0
    assert sizes.sum() / (num_bins * 4097) > 0.999


def packed(prefix: Path, documents: list[list[int]], **changes: object) -> PackedDataset:
    with IndexedWriter(prefix, 30_000) as writer:
        for document in documents:
            writer.write(np.array(document, dtype=np.int64))
            writer.end_document()
    return opened(prefix, **changes)


def opened(prefix: Path, **changes: object) -> PackedDataset:
    source = IndexedDataset(prefix)
    options = {"seq_len": 8, "seed": 3, "vocab_size": 30_000, "document_mask": True, "cache": prefix.parent / "cache"}
    return PackedDataset(source, every_document(source), packing="documents", **(options | changes))  # type: ignore[arg-type]


def distinct(lengths: list[int]) -> list[list[int]]:
    """Documents in which every token of the set is another, and none is 0."""
    return [list(range(1 + a, 1 + b)) for a, b in pairwise(np.cumsum([0, *lengths]).tolist())]


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    seq_len=st.integers(1, 14),
    document_mask=st.booleans(),
    epoch=st.integers(0, 2),
)
def test_every_token_stands_in_one_sample_and_only_long_documents_are_cut(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int, document_mask: bool, epoch: int
) -> None:
    if sum(lengths) < seq_len + 1:
        return
    documents = distinct(lengths)
    owner = {token: number for number, document in enumerate(documents) for token in document}
    folder = tmp_path_factory.mktemp("packed")
    data = packed(folder / "tokens", documents, seq_len=seq_len, document_mask=document_mask)
    seen: list[int] = []
    parts: Counter[int] = Counter()
    for sample in range(epoch * len(data), (epoch + 1) * len(data)):
        window = data.window(sample)
        assert len(window.tokens) == seq_len + 1
        tokens = window.tokens[: seq_len + 1 - window.padding].tolist()
        assert not window.tokens[len(tokens) :].any()
        assert window.starts.tolist() == [i for i in range(len(tokens)) if not i or tokens[i] != tokens[i - 1] + 1
                                          or owner[tokens[i]] != owner[tokens[i - 1]]]  # fmt: skip
        parts.update(owner[tokens[start]] for start in window.starts)
        seen += tokens
        batch = data.batch([sample])
        for place, label in enumerate(batch.labels_BS[0].tolist()):
            inside = place + 1 < len(tokens)
            crosses = inside and owner[tokens[place]] != owner[tokens[place + 1]]
            assert label == (tokens[place + 1] if inside and not (document_mask and crosses) else -100)
        if batch.document_lengths is not None:
            assert sum(batch.document_lengths) == seq_len
            starts = [0, *np.cumsum(batch.document_lengths).tolist()]
            assert starts[:-1] == [s for s in [*window.starts.tolist(), len(tokens)] if s < seq_len]
            assert (batch.positions_BS[0][starts[:-1]] == 0).all()
    assert sorted(seen) == list(range(1, sum(lengths) + 1)), "every token once"
    assert parts == Counter({number: -(-length // (seq_len + 1)) for number, length in enumerate(lengths)})


def test_epochs_and_seeds_differ_and_a_seed_stays(tmp_path: Path) -> None:
    documents = distinct([3, 5, 9, 2, 4, 4, 4, 6, 7, 12, 1, 8] * 4)
    one, same, other = (
        packed(tmp_path / str(i), documents, seed=seed, cache=tmp_path / f"c{i}") for i, seed in enumerate((1, 1, 2))
    )
    epochs = [one.batch(range(e * len(one), (e + 1) * len(one))).inputs_BS for e in range(2)]
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(same.batch(range(len(one))).inputs_BS, epochs[0])
    assert not torch.equal(other.batch(range(len(one))).inputs_BS, epochs[0])


def test_a_broken_index_is_one_sentence(tmp_path: Path) -> None:
    documents = distinct([3, 5, 9, 2, 4, 4])
    packed(tmp_path / "t", documents).prepare()
    (folder,) = (tmp_path / "cache").glob("order-*")
    np.save(folder / "first.npy", np.zeros(2, dtype=np.int64))
    with pytest.raises(DataError, match="delete that folder"):
        opened(tmp_path / "t").prepare()


@pytest.mark.parametrize("document_mask", [True, False])
def test_padding_in_a_batch(document_mask: bool) -> None:
    rows = [
        Window(np.array([5, 6, 7, 0, 0]), np.array([0, 1]), 2),
        Window(np.array([1, 2, 3, 4, 0]), np.array([0]), 1),
        Window(np.array([1, 2, 3, 4, 5]), np.array([0, 3])),
        Window(np.array([1, 0, 0, 0, 0]), np.array([0]), 4),
    ]
    batch = collate(rows, document_mask=document_mask)
    x = -100
    if document_mask:
        labels = [[x, 7, x, x], [2, 3, 4, x], [2, 3, x, 5], [x, x, x, x]]
        assert batch.document_lengths == (1, 2, 1, 4, 3, 1, 1, 3)
        assert batch.positions_BS.tolist() == [[0, 0, 1, 0], [0, 1, 2, 3], [0, 1, 2, 0], [0, 0, 1, 2]]
    else:
        labels = [[6, 7, x, x], [2, 3, 4, x], [2, 3, 4, 5], [x, x, x, x]]
        assert batch.document_lengths is None
    assert batch.labels_BS.tolist() == labels
