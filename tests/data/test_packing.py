"""Packing against plain lists: the stream, the windows, the mask, the epochs, the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fp8moe.data import packing
from fp8moe.data.indexed import IndexedDataset
from fp8moe.data.order import epoch_index
from fp8moe.data.packing import PackedDataset, Window, collate, every_document
from fp8moe.data.split import split_documents
from fp8moe.errors import ConfigError, DataError

MakeTokens = Callable[..., IndexedDataset]


def pack(source: IndexedDataset, cache: Path, documents: np.ndarray | None = None, **changes: object) -> PackedDataset:
    chosen = every_document(source) if documents is None else documents
    options = {"seq_len": 8, "seed": 3, "vocab_size": 1000, "document_mask": False, "cache": cache, **changes}
    return PackedDataset(source, chosen, **options)  # type: ignore[arg-type]


def some_documents(seed: int, count: int, longest: int) -> list[list[int]]:
    """Documents of distinct ids: every token of the set tells where it came from."""
    random = np.random.RandomState(seed)
    lengths = [1, longest, *random.randint(1, longest + 1, count - 2)]
    starts = np.cumsum([0, *lengths])
    return [list(range(a, b)) for a, b in pairwise(starts)]


def windows_by_hand(documents: list[list[int]], order: np.ndarray, seq_len: int) -> list[tuple[list[int], list[int]]]:
    """(tokens, places where a document starts in them) for each window, by a walk over every token."""
    stream = [(token, number) for number in order for token in documents[number]]
    windows = []
    for start in range(0, len(stream) - seq_len, seq_len):
        part = stream[start : start + seq_len + 1]
        starts = [i for i in range(len(part)) if i == 0 or part[i][1] != part[i - 1][1]]
        windows.append(([token for token, _ in part], starts))
    return windows


@pytest.mark.parametrize(("count", "longest", "seq_len"), [(30, 40, 8), (200, 3, 16), (4, 100, 1), (60, 9, 7)])
def test_samples_are_the_shuffled_windows_of_the_shuffled_documents(
    make_tokens: MakeTokens, tmp_path: Path, count: int, longest: int, seq_len: int
) -> None:
    documents = some_documents(seq_len, count, longest)
    data = pack(make_tokens(documents, 30_000), tmp_path / "c", seq_len=seq_len, vocab_size=30_000)
    lengths = np.array([len(document) for document in documents])
    total = int(lengths.sum())
    assert len(data) == (total - 1) // seq_len
    for epoch in (0, 1, 7):
        index = epoch_index(lengths, seq_len, 3, epoch)
        assert sorted(index["documents"]) == list(range(count))
        assert sorted(index["shuffle"]) == list(range(len(data)))
        expected = windows_by_hand(documents, index["documents"], seq_len)
        assert len(expected) == len(data)
        for i in range(len(data)):
            window = data.window(epoch * len(data) + i)
            tokens, starts = expected[index["shuffle"][i]]
            assert window.tokens.tolist() == tokens and window.starts.tolist() == starts


def test_an_epoch_predicts_every_token_once(make_tokens: MakeTokens, tmp_path: Path) -> None:
    documents = some_documents(0, 50, 30)
    total = sum(map(len, documents))
    data = pack(make_tokens(documents), tmp_path / "c")
    orders = []
    for epoch in range(3):
        labels = data.batch(range(epoch * len(data), (epoch + 1) * len(data))).labels_BS.flatten().tolist()
        assert max(Counter(labels).values()) == 1
        assert total - len(labels) <= 8  # the first token, and less than a window at the end
        orders.append(labels)
    assert orders[0] != orders[1] != orders[2]


def test_another_seed_is_another_order(make_tokens: MakeTokens, tmp_path: Path) -> None:
    source = make_tokens(some_documents(0, 50, 30))
    first = {
        seed: pack(source, tmp_path / "c", seed=seed).batch(range(20)).inputs_BS for seed in (0, 1, 2**32, 2**32 + 1)
    }
    assert len({tuple(batch.flatten().tolist()) for batch in first.values()}) == 4
    again = pack(source, tmp_path / "other", seed=1).batch(range(20)).inputs_BS
    assert torch.equal(again, first[1])


def test_the_order_of_a_seed_never_changes() -> None:
    """A run must resume in the same order years later: this constant may change only with a new index format."""
    lengths = (np.arange(100, dtype=np.int64) * 7) % 23 + 1
    index = epoch_index(lengths, 16, 1234, 5)
    digest = hashlib.sha256(b"".join(index[name].astype("<i8").tobytes() for name in sorted(index))).hexdigest()
    assert digest[:16] == "239a0a9185eea43a"


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    seq_len=st.integers(1, 15),
    document_mask=st.booleans(),
)
def test_batches_by_the_definition(pieces: list[int], seq_len: int, document_mask: bool) -> None:
    owner = [number for number, length in enumerate(pieces) for _ in range(length)]
    if len(owner) < seq_len + 1:
        return
    rows = []
    for start in range(len(owner) - seq_len):
        part = owner[start : start + seq_len + 1]
        starts = [i for i in range(len(part)) if i == 0 or part[i] != part[i - 1]]
        rows.append((part, Window(np.arange(start, start + seq_len + 1), np.array(starts))))
    batch = collate([window for _, window in rows], document_mask=document_mask)
    for tensor in (batch.inputs_BS, batch.labels_BS, batch.positions_BS):
        assert tensor.dtype == torch.int64 and tensor.shape == (len(rows), seq_len) and tensor.is_contiguous()
    assert (batch.document_lengths is not None) == document_mask
    for b, (part, window) in enumerate(rows):
        for s in range(seq_len):
            same = part[s] == part[s + 1]
            expected_label = window.tokens[s + 1] if same or not document_mask else -100
            first = part.index(part[s]) if document_mask else 0
            assert batch.inputs_BS[b, s] == window.tokens[s]
            assert batch.labels_BS[b, s] == expected_label
            assert batch.positions_BS[b, s] == s - first
    if batch.document_lengths is not None:
        inputs = [(b, number) for b, (part, _) in enumerate(rows) for number in part[:-1]]
        assert batch.document_lengths == tuple(len(list(same)) for _, same in groupby(inputs))


def test_a_batch_is_frozen_and_in_the_order_asked_for(make_tokens: MakeTokens, tmp_path: Path) -> None:
    data = pack(make_tokens(some_documents(0, 20, 30)), tmp_path / "c", document_mask=True)
    batch = data.batch([5, 2, 5])
    assert torch.equal(batch.inputs_BS[0], batch.inputs_BS[2])
    assert torch.equal(batch.inputs_BS[1], data.batch([2]).inputs_BS[0])
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.inputs_BS = batch.labels_BS  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.window(0).tokens = np.zeros(9)  # type: ignore[misc]


def test_empty_and_unchosen_documents_are_left_out(make_tokens: MakeTokens, tmp_path: Path) -> None:
    source = make_tokens(some_documents(0, 30, 20))
    source.document_offsets = np.repeat(source.document_offsets, 2)  # every second document is empty
    chosen = np.arange(0, len(source), 3)
    data = pack(source, tmp_path / "c", chosen)
    wanted = {
        int(token)
        for d in chosen
        for token in source.tokens[source.document_offsets[d] : source.document_offsets[d + 1]]
    }
    seen = set(data.batch(range(len(data))).inputs_BS.flatten().tolist())
    assert seen <= wanted and len(wanted) - len(seen) <= 8


@pytest.mark.parametrize(("tokens", "seq_len", "samples"), [(9, 8, 1), (16, 8, 1), (17, 8, 2), (2, 1, 1)])
def test_what_just_fits(make_tokens: MakeTokens, tmp_path: Path, tokens: int, seq_len: int, samples: int) -> None:
    data = pack(make_tokens([list(range(tokens))]), tmp_path / "c", seq_len=seq_len)
    assert len(data) == samples
    assert data.batch([0, samples - 1, samples]).labels_BS.shape == (3, seq_len)


def test_too_little_text_is_a_data_error(make_tokens: MakeTokens, tmp_path: Path) -> None:
    source = make_tokens([[1, 2, 3], [4, 5]])
    with pytest.raises(DataError, match=r"5 tokens in 2 documents .* seq_len \+ 1 = 6: use seq_len=4"):
        pack(source, tmp_path, seq_len=5)
    assert len(pack(source, tmp_path, seq_len=4)) == 1
    with pytest.raises(ConfigError, match="seq_len=0"):
        pack(source, tmp_path, seq_len=0)
    for seed in (-1, 2**63):
        with pytest.raises(ConfigError, match=rf"seed={seed} must be at least 0 and below 2\^63"):
            pack(source, tmp_path, seq_len=2, seed=seed)
    assert len(pack(source, tmp_path, seq_len=2, seed=2**63 - 1).window(0).tokens) == 3


def test_an_id_past_the_vocabulary_never_reaches_the_model(make_tokens: MakeTokens, tmp_path: Path) -> None:
    source = make_tokens([list(range(100)), [700], list(range(50))])
    data = pack(source, tmp_path / "c", vocab_size=700)
    with pytest.raises(DataError, match="token 100 has id 700, outside a vocabulary of 700"):
        data.batch(range(len(data)))


def test_the_index_is_built_once(make_tokens: MakeTokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_tokens(some_documents(0, 30, 20))
    data = pack(source, tmp_path / "c")
    data.prepare()
    expected = data.batch(range(10))

    def refuse(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(packing, "epoch_index", refuse)
    assert torch.equal(pack(source, tmp_path / "c").batch(range(10)).inputs_BS, expected.inputs_BS)
    for other in ({"seed": 4}, {"seq_len": 9}, {"documents": np.arange(20)}):
        with pytest.raises(AssertionError, match="built again"):
            pack(source, tmp_path / "c", **other).prepare()  # type: ignore[arg-type]


def test_the_name_of_an_order_never_changes(make_tokens: MakeTokens, tmp_path: Path) -> None:
    """A cache made by an earlier version must still be found: the key may change only with a new index format."""
    source = make_tokens([[1, 2, 3], [4, 5]])
    documents = hashlib.sha256(np.array([0, 1], dtype="<i8").tobytes()).hexdigest()
    parts = json.dumps([1, source.fingerprint, documents, 2, 7]).encode()
    data = pack(source, tmp_path / "c", seq_len=2, seed=7)
    data.prepare()
    assert data.fingerprint == hashlib.sha256(parts).hexdigest()[:20]
    assert [folder.name for folder in (tmp_path / "c").glob("order-*")] == [f"order-{data.fingerprint}-0"]


def test_the_indices_of_two_epochs_are_kept_open(make_tokens: MakeTokens, tmp_path: Path) -> None:
    data = pack(make_tokens([[1, 2, 3], [4, 5]]), tmp_path / "c", seq_len=2)
    opened = []
    for sample in (0, 2, 1, 4, 3, 6):
        data.window(sample)
        opened.append(sorted(data._indices))
    assert opened == [[0], [0, 1], [0, 1], [1, 2], [1, 2], [2, 3]]


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY broken", None])
def test_a_broken_cache_is_one_sentence(make_tokens: MakeTokens, tmp_path: Path, content: bytes | None) -> None:
    source = make_tokens(some_documents(0, 30, 20))
    pack(source, tmp_path / "c").prepare()
    (folder,) = (tmp_path / "c").glob("order-*")
    (folder / "shuffle.npy").unlink() if content is None else (folder / "shuffle.npy").write_bytes(content)
    with pytest.raises(DataError, match="delete that folder") as caught:
        pack(source, tmp_path / "c").prepare()
    assert "\n" not in str(caught.value)


def test_a_cached_index_of_another_size_is_refused(make_tokens: MakeTokens, tmp_path: Path) -> None:
    source = make_tokens(some_documents(0, 30, 20))
    pack(source, tmp_path / "c").prepare()
    (folder,) = (tmp_path / "c").glob("order-*")
    np.save(folder / "shuffle.npy", np.arange(3))
    with pytest.raises(DataError, match=r"has 30 documents and 3 samples instead of 30 and \d+"):
        pack(source, tmp_path / "c").prepare()


@pytest.mark.parametrize(("count", "share"), [(1000, 0.1), (1000, 0.025), (7, 0.01), (2, 0.5), (3, 0.02)])
def test_held_out_documents_are_spread_evenly(make_tokens: MakeTokens, count: int, share: float) -> None:
    train, validation = split_documents(make_tokens([[1]] * count), share)
    assert sorted([*train, *validation]) == list(range(count))
    assert len(validation) == max(1, int(count * share + 1e-9)) and len(train) >= 1
    assert count != 7 or validation.tolist() == [3]  # a share below one document: the middle one
    gaps = np.diff(validation)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_one_document_cannot_be_split(make_tokens: MakeTokens) -> None:
    with pytest.raises(DataError, match="has 1 document and holding one out needs 2"):
        split_documents(make_tokens([[1, 2, 3]]), 0.1)


@pytest.mark.parametrize("document_mask", [False, True])
def test_the_labels_of_a_single_sample_share_no_memory_with_its_inputs(document_mask: bool) -> None:
    tokens, predicted = np.arange(1, 10), np.array([0, 0, 1, 1, 1, 0, 0, 1, 1], dtype=np.uint8)
    window = Window(tokens, np.array([0]), padding=2, predicted=predicted)
    batch = collate([window], document_mask=document_mask)
    assert batch.inputs_BS.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch.labels_BS.tolist() == [[-100, 3, 4, 5, -100, -100, -100, -100]]
