"""The index of an epoch: which part of which document stands where in which sample, as int64 arrays.

It depends on document lengths, seq_len, seed and epoch alone and is computed by whole-array operations. The
permutations are those of numpy's `RandomState`, whose streams are frozen: a run resumed with another numpy sees the
same order (`Generator` was refused: its streams may change between versions).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fp8moe.data.best_fit import best_fit


def epoch_index(lengths: NDArray[np.int64], seq_len: int, seed: int, epoch: int) -> dict[str, NDArray[np.int64]]:
    """The index of one epoch of the stream over documents of `lengths` (int64, all above 0).

    documents: their order. first, offset: of each window, the place of its first document in that order and the token
    within that document. shuffle: the order of the windows.
    """
    random = np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32, epoch])
    documents = random.permutation(len(lengths)).astype(np.int64)
    ends = np.cumsum(lengths[documents])
    num_samples = (int(ends[-1]) - 1) // seq_len
    starts = np.arange(num_samples, dtype=np.int64) * seq_len
    first = np.searchsorted(ends, starts, side="right").astype(np.int64)
    offset = starts - (ends[first] - lengths[documents[first]])
    shuffle = random.permutation(num_samples).astype(np.int64)
    return {"documents": documents, "first": first, "offset": offset, "shuffle": shuffle}


def documents_index(lengths: NDArray[np.int64], seq_len: int, seed: int, epoch: int) -> dict[str, NDArray[np.int64]]:
    """The index of one epoch over documents of `lengths` (int64, all above 0); all arrays int64.

    documents, offset: of each part of a document, the document and the place in it where the part begins; a part ends
    with its document or fills a sample. first: the parts of sample n are first[n] to first[n + 1]. shuffle: order of
    the samples.
    """
    random = np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32, epoch])
    capacity = seq_len + 1
    order = random.permutation(len(lengths)).astype(np.int64)
    num_parts = -(-lengths[order] // capacity)
    documents = np.repeat(order, num_parts)
    offset = (np.arange(len(documents)) - np.repeat(np.cumsum(num_parts) - num_parts, num_parts)) * capacity
    bins, num_bins = best_fit(np.minimum(lengths[documents] - offset, capacity), capacity)
    by_bin = np.argsort(bins, kind="stable")
    first = np.searchsorted(bins[by_bin], np.arange(num_bins + 1)).astype(np.int64)
    shuffle = random.permutation(num_bins).astype(np.int64)
    return {"documents": documents[by_bin], "first": first, "offset": offset[by_bin], "shuffle": shuffle}
