"""Holds validation text out of token files: whole documents where there are several, else the end of the only one.

One book is one document: its last tokens are held out, at least those of one sample, so that a short text can be
trained on as well. They are the end because what lies between two training parts would be seen from both sides. With
several documents, `split_documents` takes some evenly through the file.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp8moe.data.cache import key_of
from fp8moe.data.indexed import IndexedDataset
from fp8moe.data.packing import every_document
from fp8moe.errors import DataError


class DividedDocument(IndexedDataset):
    """Token files of one document as two, the second from token `at` on; at: above 0, below the number of tokens."""

    def __init__(self, source: IndexedDataset, at: int) -> None:
        self.prefix, self.bin_path, self.idx_path = source.prefix, source.bin_path, source.idx_path
        self.tokens = source.tokens
        self.document_offsets = np.array([0, at, len(source.tokens)], dtype=np.int64)
        self._source, self._at = source, at
        self.fingerprint = key_of(source.fingerprint, at)

    def content(self) -> str:
        """A hash of content alone, the place of the cut included. Raises DataError."""
        return key_of(self._source.content(), self._at)


def split(
    source: IndexedDataset, validation_share: float, seq_len: int
) -> tuple[IndexedDataset, NDArray[np.int64], NDArray[np.int64]]:
    """(what to read, its training documents, its validation documents), numbers as int64.

    Raises DataError where the only document is too short for a training and a validation sample of seq_len + 1 tokens.
    """
    if np.count_nonzero(np.diff(source.document_offsets)) > 1:
        return source, *split_documents(source, validation_share)
    num_tokens, sample = len(source.tokens), seq_len + 1
    if num_tokens < 2 * sample:
        use = f"use seq_len={num_tokens // 2 - 1} or add text" if num_tokens >= 4 else "add text"
        raise DataError(
            f"{source.prefix} has {num_tokens} tokens in 1 document, and a training and a validation sample take "
            f"2 * (seq_len + 1) = {2 * sample}: {use}"
        )
    held_out = max(sample, math.ceil(num_tokens * validation_share))
    # A share of a half may round to more than leaves a sample.
    divided = DividedDocument(source, max(sample, num_tokens - held_out))
    return divided, np.array([0]), np.array([1])


def split_documents(source: IndexedDataset, validation_share: float) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """(train, validation) document numbers; the validation documents are evenly spaced through the file, with no seed.

    So both parts have documents of every origin and date; the last documents of a file may all be of one.
    """
    numbers = every_document(source)
    if len(numbers) < 2:
        raise DataError(
            f"{source.prefix} has {len(numbers)} document and holding one out needs 2: set data.validation_paths"
        )
    held_out = np.floor((numbers + 1) * validation_share) > np.floor(numbers * validation_share)
    if not held_out.any():
        held_out[len(numbers) // 2] = True
    return numbers[~held_out], numbers[held_out]
