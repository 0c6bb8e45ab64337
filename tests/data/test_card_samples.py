"""Samples of the card: every token of a packed sample in one segment, with its document, place, part and mask."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from fp8moe.data import card_samples
from fp8moe.data.card_samples import Segment, segments, training_samples
from fp8moe.data.indexed import IndexedDataset, IndexedWriter
from fp8moe.data.packing import Window
from tests.data.test_fim import BEGIN, END, EOS, HOLE, encoded, fim, texts
from tests.data.test_fim import tokenizer as tokenizer

MakeTokens = Callable[..., IndexedDataset]


def samples(source: IndexedDataset, cache: Path, **changes: object) -> list[list[Segment]]:
    options = {"packing": "stream", "document_mask": False, "seed": 3, "vocab_size": 30_000, "fim": None,
               "sentinels": None, "cache": cache, "number": 10**6, "size": 8}  # fmt: skip
    return training_samples(source, **(options | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_every_token_has_its_document_place_and_mask(
    make_tokens: MakeTokens, tmp_path: Path, packing: str, document_mask: bool
) -> None:
    starts = np.cumsum([0, 3, 25, 1, 9, 8, 2, 4, 12]).tolist()
    source = make_tokens([list(range(1 + a, 1 + b)) for a, b in pairwise(starts)], 30_000)
    source.document_offsets = np.repeat(source.document_offsets, 2)  # every second document is empty
    origin = {1 + a + i: (2 * n + 1, i) for n, (a, b) in enumerate(pairwise(starts)) for i in range(b - a)}
    found, seen = samples(source, tmp_path, packing=packing, document_mask=document_mask), []
    for sample in found:
        assert sum(len(one.ids) for one in sample) == 9
        assert all(one.document is not None for one in sample[:-1]), "padding is at the end"
        before = None
        for one in sample:
            for place, token in enumerate(one.ids.tolist(), start=one.place):
                if one.document is None:
                    assert token == 0 and not one.predicted
                    continue
                assert (one.document, place) == origin[token] and one.part == ""
                crosses = before is not None and origin[before][0] != one.document
                assert one.predicted == (before is not None and not (crosses and document_mask))
                seen.append(token)
                before = token
        for one, other in pairwise(sample):
            assert (one.document, one.predicted) != (other.document, other.predicted), "as long as it can be"
    if packing == "documents":
        assert sorted(seen) == list(origin)
    else:
        assert len(set(seen)) == len(found) * 8 + 1


@pytest.mark.parametrize("packing", ["stream", "documents"])
@pytest.mark.parametrize("on_the_fly", [True, False])
def test_parts_of_documents_that_are_cut(tokenizer: Tokenizer, tmp_path: Path, packing: str, on_the_fly: bool) -> None:
    """Under FIM here, or in the token files already; each document goes over several samples."""
    change = fim(tokenizer, 0.6)
    documents = [np.append(encoded(tokenizer, text), EOS) for text in texts(30)]
    changed = {number: change.apply(documents[number], number, 0) for number in change.chosen(30, 0).tolist()}
    with IndexedWriter(tmp_path / "t", 420) as writer:
        for number, ids in enumerate(documents):
            writer.write(ids if on_the_fly else changed.get(number, ids))
            writer.end_document()
    source = IndexedDataset(tmp_path / "t")
    source.document_offsets = np.repeat(source.document_offsets, 2)  # every second document is empty
    found = samples(source, tmp_path / "c", packing=packing, size=11, vocab_size=420,
                    fim=change if on_the_fly else None, sentinels=(BEGIN, HOLE, END))  # fmt: skip
    names, tokens, cut = {BEGIN: "prefix", HOLE: "suffix", END: "middle"}, 0, 0
    for sample in found:
        for one in sample:
            if one.document is None:
                continue
            whole = changed.get(one.document // 2, documents[one.document // 2]).tolist()
            assert whole[one.place : one.place + len(one.ids)] == one.ids.tolist()
            marks = [token for token in whole[: one.place + 1] if token in names]
            assert one.part == (names[marks[-1]] if marks else "")
            assert not set(one.ids[1:].tolist()) & set(names), "a sentinel begins its part"
            tokens, cut = tokens + len(one.ids), cut + (one.part in ("suffix", "middle") and sample[0] is one)
    assert tokens > 300 and cut > 3 and 8 < len(changed) < 28


def test_of_many_documents_some_are_packed(
    make_tokens: MakeTokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card_samples, "MOST_DOCUMENTS", 10)
    source = make_tokens([[n, n] for n in range(200)])
    seen = {one.document for sample in samples(source, tmp_path, size=4) for one in sample}
    assert len(seen) <= 10 and min(seen) < 30 and max(seen) > 170  # type: ignore[type-var]
    assert len(samples(source, tmp_path / "b", size=60)) == 2, "as many documents as a sample may need"
    assert len(samples(source, tmp_path / "c", size=60, number=1)) == 1
    (sample,) = samples(make_tokens([[5, 6, 7]], name="u"), tmp_path / "d", size=60)
    assert [one.ids.tolist() for one in sample] == [[5], [6, 7]]
    assert samples(make_tokens([[5]], name="v"), tmp_path / "e") == []


def test_padding_is_a_segment_of_its_own() -> None:
    window = Window(np.array([5, 6, 7, 0, 0]), np.array([0, 1]), 2, origins=((4, 9), (2, 0)))
    found = segments(window, [np.zeros(1), np.zeros(2)], True)
    assert [(one.ids.tolist(), one.document, one.place, one.predicted) for one in found] == [
        ([5], 4, 9, False), ([6], 2, 0, False), ([7], 2, 1, True), ([0, 0], None, 0, False)]  # fmt: skip
