"""What must hold of every epoch, whatever the packing, the mask, fill-in-the-middle (FIM) and the mixture.

The tokens of the text are all different, and FIM cuts between them (a character a token), so each tells its source and
document; a document ends with EOS, which stays last under FIM.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from fp8moe.data.build import open_data
from fp8moe.data.fim import FillInTheMiddle
from fp8moe.data.indexed import IndexedDataset, IndexedWriter
from fp8moe.data.packing import PackedDataset, collate, every_document
from fp8moe.data.sampler import BlendedDataset
from fp8moe.data.sources import DataConfig
from fp8moe.data.tokenizer import save_tokenizer
from tests.data.test_fim import BEGIN, END, EOS, HOLE, _tokenizer, encoded, texts

SENTINELS = (BEGIN, HOLE, END)
FIRST = 4  # id of text


def characters(size: int) -> tuple[Tokenizer, list[bytes]]:
    """A tokenizer of one character an id, and the bytes of each id."""
    letters = {chr(0x4E00 + token): token for token in range(FIRST, size)}
    special = {"<eos>": EOS, "<begin>": BEGIN, "<hole>": HOLE, "<end>": END}
    tokenizer = Tokenizer(models.WordLevel(special | letters, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return tokenizer, [b""] * FIRST + [letter.encode() for letter in letters]


CASES = st.fixed_dictionaries(
    {
        "sources": st.lists(st.lists(st.integers(1, 25), min_size=2, max_size=9), min_size=1, max_size=3),
        "weights": st.tuples(*[st.sampled_from([0.3, 1.0, 2.5])] * 3),
        "seq_len": st.integers(1, 16),
        "seed": st.integers(0, 3),
        "packing": st.sampled_from(["stream", "documents"]),
        "document_mask": st.booleans(),
        "rate": st.sampled_from([0.0, 0.4, 1.0]),
    }
)


@settings(deadline=None, max_examples=30)
@given(case=CASES)
def test_every_token_of_every_source_once_an_epoch_and_no_label_across_documents(
    tmp_path_factory: pytest.TempPathFactory, case: dict[str, Any]
) -> None:
    seq_len, packing, rate = case["seq_len"], case["packing"], case["rate"]
    lengths = [source for source in case["sources"] if sum(source) + len(source) > seq_len]
    if not lengths:
        return
    folder = tmp_path_factory.mktemp("epoch")
    vocab_size = FIRST + sum(map(sum, lengths))
    tokenizer, strings = characters(vocab_size)
    owner: dict[int, tuple[int, int]] = {}  # (source, document) of a token
    parts = []
    for number, source in enumerate(lengths):
        with IndexedWriter(folder / str(number), vocab_size) as writer:
            for document, length in enumerate(source):
                ids = range(FIRST + len(owner), FIRST + len(owner) + length)
                owner |= dict.fromkeys(ids, (number, document))
                writer.write(np.array([*ids, EOS]))
                writer.end_document()
        opened = IndexedDataset(folder / str(number))
        fim = FillInTheMiddle(rate, tokenizer, strings, SENTINELS, EOS, case["seed"]) if rate else None
        parts.append(PackedDataset(
            opened, every_document(opened), seq_len=seq_len, seed=case["seed"], vocab_size=vocab_size,
            document_mask=case["document_mask"], cache=folder / "cache", packing=packing, fim=fim))  # fmt: skip
    weights = case["weights"][: len(parts)]
    data = BlendedDataset(parts, weights, document_mask=case["document_mask"])
    seen: list[Counter[int]] = [Counter() for _ in parts]  # tokens of each source in its first epoch
    read, sample = [0] * len(parts), 0
    while any(count < len(part) for count, part in zip(read, parts, strict=True)):
        number = data.locate(sample)[0]
        if read[number] < len(parts[number]):
            window = data.window(sample)
            real = window.tokens[: seq_len + 1 - window.padding].tolist()
            assert {owner[token][0] for token in real if token >= FIRST} <= {number}, "a sample is of one source"
            seen[number].update(real if packing == "documents" else real[1:])
            batch = collate([window], document_mask=case["document_mask"])
            check_labels(real, batch.inputs_BS[0].tolist(), batch.labels_BS[0].tolist(), owner, case["document_mask"])
        read[number] += 1
        sample += 1
    for number, (source, found) in enumerate(zip(lengths, seen, strict=True)):
        text = {token for token, (where, _) in owner.items() if where == number}
        missing = text - set(found)
        assert max(found[token] for token in text) == 1, "no token twice"
        if packing == "documents":
            assert not missing and found[EOS] == len(source) >= found[BEGIN] == found[HOLE] == found[END]
        else:  # the first token, and less than a sample at the end
            kept = sum(found.values())
            assert kept % seq_len == 0 and len(missing) <= seq_len
            assert all(abs(found[one] - found[BEGIN]) <= seq_len for one in SENTINELS)
        assert rate != 1.0 or abs(found[BEGIN] - len(source)) <= (seq_len if packing == "stream" else 0)
        assert rate != 0.0 or not any(found[one] for one in SENTINELS)


def check_labels(
    real: list[int], inputs: list[int], labels: list[int], owner: dict[int, tuple[int, int]], document_mask: bool
) -> None:
    """A label is the token after its input; padding is none, with the mask neither is a document's first token."""
    assert inputs[: len(real)] == real[: len(inputs)]
    expected = [-100 if document_mask and one == EOS else after for one, after in pairwise(real)]
    assert labels == expected + [-100] * (len(inputs) - len(expected))
    if document_mask:
        for one, label in zip(inputs, labels, strict=True):
            assert label == -100 or one < FIRST or label < FIRST or owner[one] == owner[label]


def test_the_share_of_documents_under_fim_in_the_samples_of_a_mixture(tmp_path: Path) -> None:
    """Counted from the tokens of two epochs of each source, as a run opens them."""
    tokenizer, count, rate = _tokenizer(), 1000, 0.2
    pool = [encoded(tokenizer, text[:24] or "x") for text in texts(200)]
    for name in "ab":
        with IndexedWriter(tmp_path / name, 420) as writer:
            for number in range(count):
                writer.write(np.append(pool[number % len(pool)], EOS))
                writer.end_document()
    save_tokenizer(tokenizer, tmp_path / "a.tokenizer.json")
    paths = tuple(str(tmp_path / name) for name in "ab")
    config = DataConfig(source="indexed", paths=paths, weights=(2.0, 1.0), validation_share=0.02, vocab_size=420,
                        packing="documents", fim_rate=rate, cache_dir=str(tmp_path / "c"))  # fmt: skip
    train = open_data(config, seq_len=127, seed=11).train
    assert isinstance(train, BlendedDataset)
    for part in train.sources:
        assert isinstance(part, PackedDataset)
        found, first = [], 0
        for epoch in range(2):
            size = len(part._index(epoch)["shuffle"])
            tokens = np.concatenate([part.window(first + sample).tokens for sample in range(size)])
            found.append([int((tokens == sentinel).sum()) for sentinel in SENTINELS])
            first += size
        documents = part.num_documents
        assert documents == round(count * 0.98)
        bound = 4 * math.sqrt(documents * rate * (1 - rate))
        for begin, hole, end in found:
            assert begin == hole == end and abs(begin - rate * documents) < bound
