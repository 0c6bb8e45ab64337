"""The byte bigram baseline against counting with a dictionary over the text itself."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest

from fp8moe.data import bigram
from fp8moe.data.bigram import ByteBigram, bigram_bits_per_byte
from fp8moe.data.indexed import IndexedDataset
from fp8moe.data.packing import Batch, PackedDataset, Window, collate, every_document

MakeTokens = Callable[..., IndexedDataset]
# id 0 ends a document; the others stand for one to three bytes.
STRINGS = [b"", b"a", b"b", b"ab", b"\xff", b"abc", b"c", b"\x00b"]


def packed(source: IndexedDataset, cache: Path, *, document_mask: bool, seq_len: int = 4) -> PackedDataset:
    options = {"seq_len": seq_len, "seed": 0, "vocab_size": len(STRINGS), "cache": cache}
    return PackedDataset(source, every_document(source), document_mask=document_mask, **options)  # type: ignore[arg-type]


def symbols_of(tokens: list[int]) -> list[tuple[int, int]]:
    """(symbol, place of its token) one by one."""
    return [(symbol, at) for at, token in enumerate(tokens) for symbol in (STRINGS[token] or [256])]


def pairs_by_hand(data: PackedDataset, samples: int) -> list[tuple[int, int]]:
    pairs = []
    for n in range(samples):
        window = data.window(n)
        hidden = {0, *window.starts.tolist()} if data.document_mask else {0}
        for (before, _), (symbol, at) in pairwise(symbols_of(window.tokens.tolist())):
            if at not in hidden:
                pairs.append((before, symbol))
    return pairs


@pytest.mark.parametrize("document_mask", [False, True])
def test_bits_per_byte_by_hand(
    make_tokens: MakeTokens, tmp_path: Path, document_mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bigram, "_CHUNK_TOKENS", 12)  # several chunks
    random = np.random.RandomState(1)

    def data(name: str, count: int) -> PackedDataset:
        documents = [[*random.randint(1, len(STRINGS), random.randint(1, 9)), 0] for _ in range(count)]
        source = make_tokens(documents, len(STRINGS), name)
        return packed(source, tmp_path / "c", document_mask=document_mask)

    train, validation = data("train", 60), data("validation", 20)
    counts = Counter(pairs_by_hand(train, len(train)))
    seen = Counter(before for before, _ in counts.elements())
    for samples in (None, 5):
        pairs = pairs_by_hand(validation, samples or len(validation))
        bits = sum(-math.log2((counts[pair] + 1) / (seen[pair[0]] + 257)) for pair in pairs)
        num_bytes = sum(symbol != 256 for _, symbol in pairs)
        found = bigram_bits_per_byte(train, validation, STRINGS, validation_samples=samples)
        assert found == pytest.approx(bits / num_bytes, rel=1e-12)


def test_bytes_counted_are_the_bytes_of_the_labels(make_tokens: MakeTokens, tmp_path: Path) -> None:
    random = np.random.RandomState(2)
    source = make_tokens([[*random.randint(1, 8, 11), 0] for _ in range(9)], 8)
    for document_mask in (False, True):
        data = packed(source, tmp_path / "c", document_mask=document_mask)
        batch = data.batch(range(len(data)))
        labels = batch.labels_BS[batch.labels_BS != -100].tolist()
        assert ByteBigram(STRINGS).score(batch)[1] == sum(len(STRINGS[label]) for label in labels)


def test_one_epoch_counts_every_pair_of_the_text_once(make_tokens: MakeTokens, tmp_path: Path) -> None:
    document = [1, 2, 3, 4, 5, 6, 7, 5, 3, 1, 1, 2, 0]  # 13 tokens, 3 windows of 4 + 1: nothing is left over
    data = packed(make_tokens([document], 8), tmp_path / "c", document_mask=False)
    model = ByteBigram(STRINGS)
    model.count(data.batch(range(len(data))))
    expected = Counter(pairwise(symbol for symbol, _ in symbols_of(document)))
    assert {pair: int(model.counts[pair]) for pair in expected} == dict(expected)
    assert model.counts.sum() == expected.total()


def test_without_training_all_symbols_are_alike(make_tokens: MakeTokens, tmp_path: Path) -> None:
    data = packed(make_tokens([[1, 2, 6, 4, 1]], 8), tmp_path / "c", document_mask=False)
    bits, num_bytes = ByteBigram(STRINGS).score(data.batch([0]))
    assert num_bytes == 4 and bits == pytest.approx(4 * math.log2(257))


def test_training_stops_where_it_is_told(make_tokens: MakeTokens, tmp_path: Path) -> None:
    train = packed(make_tokens([[1, 2] * 40], 8, "train"), tmp_path / "c", document_mask=False)
    validation = packed(make_tokens([[1, 2, 1, 2, 1]], 8, "validation"), tmp_path / "c", document_mask=False)
    figures = [bigram_bits_per_byte(train, validation, STRINGS, train_tokens=tokens) for tokens in (4, 20, 80)]
    assert figures[0] > figures[1] > figures[2]


class Recorded:
    """A data set that records which samples are read together."""

    def __init__(self, data: PackedDataset) -> None:
        self.data, self.fingerprint, self.batches = data, data.fingerprint, list[list[int]]()

    def __len__(self) -> int:
        return len(self.data)

    def window(self, sample_id: int) -> Window:
        return self.data.window(sample_id)

    def batch(self, sample_ids: Sequence[int]) -> Batch:
        self.batches.append(list(sample_ids))
        return self.data.batch(sample_ids)


@pytest.mark.parametrize(
    ("chunk_tokens", "train_tokens", "counted"),
    [(10, 20, [[0, 1], [2, 3], [4]]), (14, 23, [[0, 1], [2, 3], [4]]), (4, 8, [[0], [1]]), (99, 3, [[0]])],
)
def test_which_samples_are_counted_and_scored(
    make_tokens: MakeTokens,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chunk_tokens: int,
    train_tokens: int,
    counted: list[list[int]],
) -> None:
    monkeypatch.setattr(bigram, "_CHUNK_TOKENS", chunk_tokens)  # a window has 5 tokens and predicts 4
    source = make_tokens([[1, 2] * 14 + [1]], 8)
    train, validation = (Recorded(packed(source, tmp_path / "c", document_mask=False)) for _ in range(2))
    bigram_bits_per_byte(train, validation, STRINGS, validation_samples=3, train_tokens=train_tokens)
    assert train.batches == counted and [*chain(*validation.batches)] == [0, 1, 2]
    train.batches.clear()
    bigram_bits_per_byte(train, validation, STRINGS)
    assert [*chain(*train.batches)] == list(range(7)) == [*chain(*validation.batches)][3:]


@pytest.mark.parametrize("text", [[0, 0, 0, 0, 0], [0, 0, 0, 0, 1]])
def test_text_of_no_or_one_byte(make_tokens: MakeTokens, tmp_path: Path, text: list[int]) -> None:
    train = packed(make_tokens([[0, 1, 0, 1, 0]], 8, "train"), tmp_path / "c", document_mask=False)
    validation = packed(make_tokens([text], 8, "validation"), tmp_path / "c", document_mask=False)
    # (0, 1) was seen twice and (0, 0) never: 3 / 259 and 1 / 259.
    expected = 4 * math.log2(259) - (math.log2(3) if text[-1] else 0)
    assert bigram_bits_per_byte(train, validation, STRINGS) == pytest.approx(expected)


def test_a_masked_last_label_hides_nothing_else() -> None:
    window = Window(np.array([1, 2, 6, 5]), np.array([0, 3]))
    bits, num_bytes = ByteBigram(STRINGS).score(collate([window, window], document_mask=True))
    assert num_bytes == 4 and bits == pytest.approx(4 * math.log2(257))
