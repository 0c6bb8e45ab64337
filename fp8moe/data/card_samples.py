"""Samples of token files as training sees them: whole runs of tokens with their document, their part under
fill-in-the-middle (FIM), and whether they are predicted.

They are made by the classes that training uses (`PackedDataset`, `FillInTheMiddle`, `collate`), so that the mask shown
is the mask of the loss. Of a file of many documents MOST_DOCUMENTS are packed, spread evenly over it: the index of an
epoch of all of them, and their FIM, would be made for a few samples. So the samples are not those of a run.

A document is under FIM if it begins with the first sentinel, also where the token files were written so; the sentinel
in front of a part belongs to it, and the end-of-text to the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fp8moe.data.fim import FillInTheMiddle
from fp8moe.data.indexed import IndexedDataset
from fp8moe.data.packing import IGNORED_LABEL, PackedDataset, Window, collate

MOST_DOCUMENTS = 1000
PARTS = ("", "prefix", "suffix", "middle")


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a sample that are alike.

    ids: int64. document: its number in the file, None for padding. place: of the first token within the document, after
    FIM. part: of PARTS, empty without FIM. predicted: whether the loss has them as labels.
    """

    ids: NDArray[np.int64]
    document: int | None
    place: int
    part: str
    predicted: bool


def training_samples(
    source: IndexedDataset,
    number: int,
    size: int,
    *,
    packing: str,
    document_mask: bool,
    seed: int,
    vocab_size: int,
    fim: FillInTheMiddle | None,
    sentinels: Sequence[int] | None,
    cache: Path,
) -> list[list[Segment]]:
    """The first `number` samples of `size` predicted places, fewer of both where there is less text.

    sentinels: ids of begin, hole, end; None: the vocabulary has none. cache: a folder for the index. Other arguments as
    of `PackedDataset`. Raises ConfigError and DataError.
    """
    lengths = np.diff(source.document_offsets)
    filled = np.flatnonzero(lengths)
    most = min(len(filled), max(MOST_DOCUMENTS, size + 1))
    documents = filled[np.linspace(0, max(0, len(filled) - 1), most).astype(np.int64)]
    size = min(size, int(lengths[documents].sum()) - 1)
    if size < 1:
        return []
    data = PackedDataset(source, documents, seq_len=size, seed=seed, vocab_size=vocab_size,
                         document_mask=document_mask, cache=cache, packing=packing, fim=fim)  # fmt: skip
    chosen = set() if fim is None else set(documents[fim.chosen(len(documents), 0)].tolist())

    def parts_of(document: int) -> NDArray[np.int64]:
        begin, end = source.document_offsets[document : document + 2].tolist()
        ids = source.tokens[begin:end].astype(np.int64)
        if fim is not None and document in chosen:
            ids = fim.apply(ids, int(np.searchsorted(documents, document)), 0)
        return _parts(ids, sentinels)

    samples = []
    for sample in range(min(number, len(data))):
        window = data.window(sample)
        parts = [parts_of(document)[place:] for document, place in window.origins]
        samples.append(segments(window, parts, document_mask))
    return samples


def _parts(ids: NDArray[np.int64], sentinels: Sequence[int] | None) -> NDArray[np.int64]:
    """The place in PARTS of each token of a whole document."""
    if sentinels is None or not len(ids) or ids[0] != sentinels[0]:
        return np.zeros(len(ids), dtype=np.int64)
    found = np.zeros(len(ids), dtype=np.int64)
    for part, sentinel in enumerate(sentinels, start=1):
        found[ids == sentinel] = part
    last = np.maximum.accumulate(np.where(found > 0, np.arange(len(ids)), 0))
    return found[last]


def segments(window: Window, parts: Sequence[NDArray[np.int64]], document_mask: bool) -> list[Segment]:
    """The tokens of a sample cut where document, part or mask change.

    parts: for each of the window's `origins`, the places in PARTS of the document's tokens from there on.
    """
    labels = collate([window], document_mask=document_mask).labels_BS[0].numpy()
    predicted = np.concatenate([[False], labels != IGNORED_LABEL])
    end = len(window.tokens) - window.padding
    bounds = [*window.starts.tolist(), end]
    found = []
    for (begin, stop), (document, place), names in zip(pairwise(bounds), window.origins, parts, strict=True):
        changes = np.flatnonzero(np.diff(predicted[begin:stop]) | (np.diff(names[: stop - begin]) != 0)) + 1
        for low, high in pairwise([0, *changes.tolist(), stop - begin]):
            ids, part = window.tokens[begin + low : begin + high], PARTS[int(names[low])]
            found.append(Segment(ids, document, place + low, part, bool(predicted[begin + low])))
    if window.padding:
        found.append(Segment(window.tokens[end:], None, 0, "", bool(predicted[end:].any())))
    return found
