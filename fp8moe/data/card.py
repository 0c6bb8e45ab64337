"""The card of token files: what they hold in figures; `card_samples` has samples of their text.

Counted in one pass, in the order of the file, by chunks of the memory map: tokens by id, which gives the bytes of the
text and the ids that are used, and a hash of 16 bytes for every document, which finds exact duplicates (about 100 bytes
of memory a document). A document is empty if it has no token besides the end-of-text.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fp8moe.data.indexed import IndexedDataset

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Card:
    """documents, empty, duplicates: numbers of documents; the last are those after the first of their text.
    lengths: int64 [documents], tokens with end-of-text. num_bytes: of the text, None without a tokenizer.
    used_ids: different ids. largest_id: the largest of them."""

    documents: int
    empty: int
    duplicates: int
    tokens: int
    lengths: NDArray[np.int64]
    num_bytes: int | None
    used_ids: int
    largest_id: int


def card_of(source: IndexedDataset, token_bytes: NDArray[np.int64] | None, end_of_text: int | None) -> Card:
    """Reads token files whole. token_bytes: int64 [ids], bytes of each id; an id past them has none."""
    lengths = np.diff(source.document_offsets)
    counts = np.zeros(0, dtype=np.int64)
    for start in range(0, len(source.tokens), _CHUNK):
        part = np.bincount(source.tokens[start : start + _CHUNK])
        counts, part = (counts, part) if len(counts) >= len(part) else (part, counts)
        counts[: len(part)] += part
    seen: set[bytes] = set()
    empty = duplicates = 0
    for start, end in zip(source.document_offsets.tolist(), source.document_offsets[1:].tolist(), strict=False):
        document = source.tokens[start:end]
        if end - start == 0 or (end - start == 1 and int(document[0]) == end_of_text):
            empty += 1
            continue
        key = hashlib.blake2b(document.tobytes(), digest_size=16).digest()
        duplicates += key in seen
        seen.add(key)
    num_bytes = None
    if token_bytes is not None:
        known = min(len(counts), len(token_bytes))
        num_bytes = int(counts[:known] @ token_bytes[:known])
    used = np.flatnonzero(counts)
    return Card(
        len(source), empty, duplicates, len(source.tokens), lengths, num_bytes, len(used), int(used.max(initial=0))
    )


def histogram(lengths: NDArray[np.int64], width: int = 40) -> list[str]:
    """Lines of a histogram of document lengths in tokens, by powers of two: range, documents, their share, a bar."""
    bins = np.where(lengths > 0, np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64) + 1, 0)
    counts = np.bincount(bins)
    first = int(np.flatnonzero(counts)[0]) if counts.any() else 0
    lines = []
    for number in range(first, len(counts)):
        low, high = (0, 0) if number == 0 else (1 << (number - 1), (1 << number) - 1)
        name = f"{low:,}" if low == high else f"{low:,}-{high:,}"
        bar = "#" * round(width * counts[number] / counts.max())
        lines.append(f"{name:>23} {counts[number]:>12,} {counts[number] / len(lengths):>6.1%} {bar}".rstrip())
    return lines
