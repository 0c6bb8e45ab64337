"""Documents to samples: one stream of tokens per epoch, cut into windows of seq_len + 1.

For each epoch the documents are put in a random order, laid end to end, and cut; windows start every seq_len tokens and
overlap by one, so that every token but the first is predicted exactly once and no label is missing at a window's end.
Fewer than seq_len tokens at the end of an epoch are dropped (others each time, the order being another). Then the
windows are shuffled. Sample n of the endless stream is window `shuffle[n mod N]` of epoch n div N, of N windows.

The index of an epoch is four int64 arrays: `documents` (the order), `first` and `offset` (for each window its first
document, as a place in that order, and the token within it), and `shuffle`. It is a pure function of document lengths,
seq_len, seed and epoch, made by whole-array operations, cached as .npy, and read by memory map, so the ranks of a node
share its pages. The permutations are those of numpy's `RandomState`, whose streams are frozen: a run resumed with
another numpy sees the same order (those of `Generator` may change from version to version).

Legend: B samples, S seq_len.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fp8moe.data.cache import built_folder, key_of
from fp8moe.data.indexed import IndexedDataset
from fp8moe.errors import ConfigError, DataError

IGNORED_LABEL = -100
_INDEX_FORMAT = 1
_INDEX_ARRAYS = ("documents", "first", "offset", "shuffle")


@dataclass(frozen=True)
class Batch:
    """What a step consumes; all int64 on the CPU.

    inputs_BS: token ids. labels_BS: the id that follows each, or -100 where none is predicted.
    positions_BS: 0, 1, 2, ...; starts again at each document when the document mask is on.
    documents_BS: which document of its sample each input belongs to, from 0; None when the document mask is off.
    """

    inputs_BS: Tensor
    labels_BS: Tensor
    positions_BS: Tensor
    documents_BS: Tensor | None


@dataclass(frozen=True)
class Window:
    """One sample. tokens: int64 [S + 1]; starts: int64, where in it a document (or the rest of one) begins, 0 first."""

    tokens: NDArray[np.int64]
    starts: NDArray[np.int64]


class Dataset(Protocol):
    """An endless stream of samples; `len()` of them are one epoch."""

    @property
    def fingerprint(self) -> str:
        """Names content and order for caches."""

    def __len__(self) -> int: ...

    def window(self, sample_id: int) -> Window:
        """The tokens of sample `sample_id` >= 0."""

    def batch(self, sample_ids: Sequence[int]) -> Batch:
        """Samples by number, in the order asked for."""


def collate(windows: Sequence[Window], *, document_mask: bool) -> Batch:
    """Windows to a batch; with `document_mask`, see `Batch`, labels that belong to another document are -100."""
    tokens = torch.from_numpy(np.stack([window.tokens for window in windows]))
    inputs_BS, labels_BS = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if not document_mask:
        positions_BS = torch.arange(inputs_BS.shape[1]).expand_as(inputs_BS).contiguous()
        return Batch(inputs_BS, labels_BS, positions_BS, None)
    is_start = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, window in enumerate(windows):
        is_start[row, torch.from_numpy(window.starts)] = True
    labels_BS = labels_BS.masked_fill(is_start[:, 1:], IGNORED_LABEL)
    place = torch.arange(inputs_BS.shape[1])
    start_of_document = torch.where(is_start[:, :-1], place, 0).cummax(dim=1).values
    documents_BS = is_start[:, :-1].to(torch.int64).cumsum(dim=1) - 1
    return Batch(inputs_BS, labels_BS, place - start_of_document, documents_BS)


def epoch_index(lengths: NDArray[np.int64], seq_len: int, seed: int, epoch: int) -> dict[str, NDArray[np.int64]]:
    """The index of one epoch over documents of these lengths (int64, all above 0); see the top of this module."""
    random = np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32, epoch])
    documents = random.permutation(len(lengths)).astype(np.int64)
    ends = np.cumsum(lengths[documents])
    num_samples = (int(ends[-1]) - 1) // seq_len
    starts = np.arange(num_samples, dtype=np.int64) * seq_len
    first = np.searchsorted(ends, starts, side="right").astype(np.int64)
    offset = starts - (ends[first] - lengths[documents[first]])
    shuffle = random.permutation(num_samples).astype(np.int64)
    return {"documents": documents, "first": first, "offset": offset, "shuffle": shuffle}


class PackedDataset:
    """Documents of one `IndexedDataset`, packed.

    documents: which of them, int64; empty ones are left out. Raises DataError when they don't fill one sample, or when
    an id is not below `vocab_size` (checked again whenever a window is read).
    cache: folder for the indices.
    """

    def __init__(
        self,
        source: IndexedDataset,
        documents: NDArray[np.int64],
        *,
        seq_len: int,
        seed: int,
        vocab_size: int,
        document_mask: bool,
        cache: Path,
    ) -> None:
        if seq_len < 1:
            raise ConfigError(f"seq_len={seq_len} must be at least 1")
        if seed < 0 or seed >= 2**63:
            raise ConfigError(f"seed={seed} is outside [0, 2^63)")
        lengths = source.document_offsets[documents + 1] - source.document_offsets[documents]
        self._documents = documents[lengths > 0]
        self._lengths = lengths[lengths > 0]
        self.num_tokens = int(self._lengths.sum())
        if self.num_tokens < seq_len + 1:
            raise DataError(
                f"{source.prefix}: {self.num_tokens} tokens in {len(self._documents)} documents don't fill a sample of "
                f"seq_len + 1 = {seq_len + 1}: use seq_len={max(1, self.num_tokens - 1)} or add text"
            )
        self._source, self._seq_len, self._seed, self._vocab_size = source, seq_len, seed, vocab_size
        self.document_mask = document_mask
        self._cache = cache
        self._indices: dict[int, dict[str, NDArray[np.int64]]] = {}
        chosen = hashlib.sha256(self._documents.tobytes()).hexdigest()
        self.fingerprint = key_of(_INDEX_FORMAT, source.fingerprint, chosen, seq_len, seed)

    def __len__(self) -> int:
        """Samples in an epoch."""
        return (self.num_tokens - 1) // self._seq_len

    def prepare(self) -> None:
        """Builds what the first epoch needs, or finds it in the cache."""
        self._index(0)

    def _index(self, epoch: int) -> dict[str, NDArray[np.int64]]:
        if epoch not in self._indices:
            if len(self._indices) == 2:  # a batch touches two epochs at most, unless it is larger than one
                self._indices.pop(min(self._indices))
            self._indices[epoch] = self._load_index(epoch)
        return self._indices[epoch]

    def _load_index(self, epoch: int) -> dict[str, NDArray[np.int64]]:
        def build(folder: Path) -> None:
            for name, values in epoch_index(self._lengths, self._seq_len, self._seed, epoch).items():
                np.save(folder / f"{name}.npy", values)

        folder = built_folder(self._cache, f"order-{self.fingerprint}-{epoch}", build)
        try:
            index = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _INDEX_ARRAYS}
            sizes = [len(index[name]) for name in _INDEX_ARRAYS]
        except (OSError, ValueError, EOFError, TypeError) as error:
            raise DataError(f"the cached sample order {folder} is broken ({error}): delete that folder") from error
        if sizes != [len(self._lengths), len(self), len(self), len(self)]:
            raise DataError(f"the cached sample order {folder} has {sizes[3]} samples, not {len(self)}: delete it")
        return index

    def window(self, sample_id: int) -> Window:
        """The tokens of sample `sample_id` >= 0. Raises DataError at an id past the vocabulary."""
        assert sample_id >= 0
        epoch, within = divmod(sample_id, len(self))
        index = self._index(epoch)
        number = int(index["shuffle"][within])
        place, offset = int(index["first"][number]), int(index["offset"][number])
        tokens = np.empty(self._seq_len + 1, dtype=np.int64)
        starts, filled = [], 0
        while filled < len(tokens):
            document = int(index["documents"][place])
            begin = int(self._source.document_offsets[self._documents[document]]) + offset
            count = min(int(self._lengths[document]) - offset, len(tokens) - filled)
            piece = self._source.tokens[begin : begin + count]
            self._source.check_ids(piece, begin, self._vocab_size)
            tokens[filled : filled + count] = piece
            starts.append(filled)
            filled, place, offset = filled + count, place + 1, 0
        return Window(tokens, np.array(starts, dtype=np.int64))

    def batch(self, sample_ids: Sequence[int]) -> Batch:
        """Samples by number, in the order asked for."""
        return collate([self.window(sample_id) for sample_id in sample_ids], document_mask=self.document_mask)


def every_document(source: IndexedDataset) -> NDArray[np.int64]:
    """The numbers of all documents."""
    return np.arange(len(source), dtype=np.int64)


def split_documents(source: IndexedDataset, validation_share: float) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """(train, validation) documents: every (1/share)-th is held out, evenly through the file and without a seed.

    Even spacing keeps a file that is ordered by origin or date represented in both parts; a tail would not.
    """
    numbers = every_document(source)
    if len(numbers) < 2:
        raise DataError(f"{source.prefix} has {len(numbers)} document and a split needs 2: give data.validation_paths")
    held_out = np.floor((numbers + 1) * validation_share) > np.floor(numbers * validation_share)
    if not held_out.any():
        held_out[len(numbers) // 2] = True
    return numbers[~held_out], numbers[held_out]
