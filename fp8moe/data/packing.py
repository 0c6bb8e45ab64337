"""Packing: the documents of an epoch joined into one stream of tokens and cut into samples of seq_len + 1.

For each epoch the documents are put in a random order, joined, and cut; windows start every seq_len tokens and overlap
by one, so that every token but the first is predicted exactly once and the last input of a window has its label. Fewer
than seq_len tokens at the end of an epoch are dropped (different ones each epoch, as the order differs). Then the
windows are shuffled. Sample n of the endless stream is window `shuffle[n mod N]` of epoch n div N, where N is the
number of windows. That is `packing=stream`; with `packing=documents` whole documents fill samples (`best_fit`), of
which one is as long, ends in padding and shares no token with another.

With fill-in-the-middle (`fim`) the documents of an epoch have other lengths than those of another, so the number of its
samples differs as well, and the index holds the lengths.

The index of an epoch (`order`) is cached as .npy and read by memory map, so the ranks of a node share its pages.

Legend: B samples, S seq_len.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fp8moe.data.cache import built_folder, key_of
from fp8moe.data.indexed import IndexedDataset
from fp8moe.data.order import documents_index, epoch_index
from fp8moe.data.whole import WholeSequences
from fp8moe.errors import ConfigError, DataError

if TYPE_CHECKING:  # it needs the package tokenizers, which a GPU machine's benchmarks do without
    from fp8moe.data.fim import FillInTheMiddle

IGNORED_LABEL = -100
_INDEX_FORMAT = 1
_INDEX_ARRAYS = ("documents", "first", "offset", "shuffle")
_FIM_ARRAYS = ("lengths", "chosen")


@dataclass(frozen=True)
class Batch:
    """The samples of one step or micro-batch; tensors are int64 on the CPU.

    inputs_BS: token ids. labels_BS: the id after each input, or -100 where none is predicted.
    positions_BS: 0, 1, 2, ...; from 0 again at each document when the document mask is on.
    document_lengths: inputs of each document, or part of one, in the order of the samples, none longer than its sample;
    padding counts as a document. None when the document mask is off.
    whole: set where the tensors hold a part of every sequence (`parallel.cp`); lengths are always of whole sequences.
    experts_BSLK: integers, the K experts of each input in each of the L layers with experts, where routers are not to
    choose them; -1: they choose.
    """

    inputs_BS: Tensor
    labels_BS: Tensor
    positions_BS: Tensor
    document_lengths: tuple[int, ...] | None
    whole: WholeSequences | None = None
    experts_BSLK: Tensor | None = None


@dataclass(frozen=True)
class Window:
    """One sample. tokens: int64 [S + 1]; starts: int64, the places in it where a document begins; the first is 0.

    padding: so many tokens at the end are padding, of id 0, and not predicted. predicted: uint8 [S + 1], 0 where a
    token is not predicted either, as what was asked in a chat; None: all are. origins: of each of `starts` the
    document's number in its file, and the place in it; empty where nobody knows.
    """

    tokens: NDArray[np.int64]
    starts: NDArray[np.int64]
    padding: int = 0
    predicted: NDArray[np.uint8] | None = None
    origins: tuple[tuple[int, int], ...] = ()


class Dataset(Protocol):
    """An endless stream of samples; `len()` of them are one epoch."""

    @property
    def fingerprint(self) -> str:
        """A name of content and order, for caches."""

    def content(self) -> str:
        """A hash of the text alone, wherever its files lie."""

    def __len__(self) -> int: ...

    def window(self, sample_id: int) -> Window:
        """The tokens of sample `sample_id` >= 0."""

    def batch(self, sample_ids: Sequence[int]) -> Batch:
        """The samples `sample_ids`, in that order."""


def collate(windows: Sequence[Window], *, document_mask: bool) -> Batch:
    """Stacks windows into a batch; with `document_mask` a label that starts another document is -100, see `Batch`."""
    tokens = torch.from_numpy(np.stack([window.tokens for window in windows]))
    # Copies: of a single sample both would be views of the same memory, and labels are written below.
    inputs_BS, labels_BS = tokens[:, :-1].clone(), tokens[:, 1:].clone()
    filled = [tokens.shape[1] - window.padding for window in windows]
    for row, (window, end) in enumerate(zip(windows, filled, strict=True)):
        labels_BS[row, end - 1 :] = IGNORED_LABEL
        if window.predicted is not None:
            labels_BS[row, torch.from_numpy(window.predicted[1:] == 0)] = IGNORED_LABEL
    if not document_mask:
        positions_BS = torch.arange(inputs_BS.shape[1]).expand_as(inputs_BS).contiguous()
        return Batch(inputs_BS, labels_BS, positions_BS, None)
    is_start = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, window in enumerate(windows):
        is_start[row, torch.from_numpy(window.starts)] = True
        is_start[row, filled[row] : filled[row] + 1] = True
    labels_BS = labels_BS.masked_fill(is_start[:, 1:], IGNORED_LABEL)
    place = torch.arange(inputs_BS.shape[1])
    start_of_document = torch.where(is_start[:, :-1], place, 0).cummax(dim=1).values
    starts = is_start[:, :-1].flatten().nonzero().flatten()  # the first token of each sample is one
    lengths = torch.diff(starts, append=torch.tensor([inputs_BS.numel()]))
    return Batch(inputs_BS, labels_BS, place - start_of_document, tuple(lengths.tolist()))


class PackedDataset:
    """Samples of the documents of one `IndexedDataset`.

    documents: int64 numbers of the documents; empty ones are left out.
    cache: folder for the indices. packing: stream or documents. fim: what rearranges a share of the documents.
    Raises ConfigError, and DataError when the documents have too few tokens for one sample.
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
        packing: str = "stream",
        fim: FillInTheMiddle | None = None,
    ) -> None:
        if seq_len < 1:
            raise ConfigError(f"seq_len={seq_len} must be at least 1")
        if seed < 0 or seed >= 2**63:
            raise ConfigError(f"seed={seed} must be at least 0 and below 2^63")
        lengths = source.document_offsets[documents + 1] - source.document_offsets[documents]
        self.documents = documents[lengths > 0]
        self._lengths = lengths[lengths > 0]
        self.num_tokens = int(self._lengths.sum())
        if self.num_tokens < (1 if packing == "documents" else seq_len + 1):
            raise DataError(
                f"{source.prefix} has {self.num_tokens} tokens in {len(self.documents)} documents and a sample needs "
                f"seq_len + 1 = {seq_len + 1}: use seq_len={max(1, self.num_tokens - 1)} or add text"
            )
        self.source, self._seq_len, self._seed, self._vocab_size = source, seq_len, seed, vocab_size
        self.document_mask, self.whole_documents, self._fim = document_mask, packing == "documents", fim
        self._cache = cache
        self._indices: dict[int, dict[str, NDArray[np.int64]]] = {}
        self._chosen = hashlib.sha256(self.documents.tobytes()).hexdigest()
        # What is not used is no part of the name, so that caches of earlier versions are found.
        more = ([packing] if self.whole_documents else []) + ([fim.key] if fim is not None else [])
        self.fingerprint = key_of(_INDEX_FORMAT, source.fingerprint, self._chosen, seq_len, seed, *more)
        self._ends: list[int] = []  # samples of the first epochs, added up; with FIM alone

    def __len__(self) -> int:
        """Number of samples in an epoch, with FIM in the first."""
        if self.whole_documents or self._fim is not None:
            return len(self._index(0)["shuffle"])
        return (self.num_tokens - 1) // self._seq_len

    @property
    def name(self) -> str:
        """Folder and name of the token files."""
        return "/".join(Path(self.source.prefix).parts[-2:])

    def tokens_with_fim(self) -> int:
        """Tokens of the first epoch, those that fill-in-the-middle adds included."""
        return self.num_tokens if self._fim is None else int(self._index(0)["lengths"].sum())

    @property
    def num_documents(self) -> int:
        """Documents that are not empty."""
        return len(self.documents)

    def content(self) -> str:
        """A hash of the text alone, wherever its files lie."""
        return key_of(self.source.content(), self._chosen)

    def prepare(self) -> None:
        """Builds the index of the first epoch, unless it is in the cache."""
        self._index(0)

    def _index(self, epoch: int) -> dict[str, NDArray[np.int64]]:
        if epoch not in self._indices:
            if len(self._indices) == 2:  # a batch reads at most two epochs, unless it is larger than an epoch
                self._indices.pop(min(self._indices))
            self._indices[epoch] = self._load_index(epoch)
        return self._indices[epoch]

    def _load_index(self, epoch: int) -> dict[str, NDArray[np.int64]]:
        def build(folder: Path) -> None:
            make = documents_index if self.whole_documents else epoch_index
            changed = {} if self._fim is None else self._fim_index(self._fim, epoch)
            arrays = make(changed.get("lengths", self._lengths), self._seq_len, self._seed, epoch)
            for name, values in (arrays | changed).items():
                np.save(folder / f"{name}.npy", values)

        names = _INDEX_ARRAYS if self._fim is None else _INDEX_ARRAYS + _FIM_ARRAYS
        folder = built_folder(self._cache, f"order-{self.fingerprint}-{epoch}", build)
        try:
            # np.load refuses pickles unless it is told otherwise.
            index = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
            sizes = [len(index[name]) for name in names]
            if any(values.dtype != np.int64 or values.ndim != 1 for values in index.values()):
                raise ValueError("its arrays are not int64")
        except (OSError, ValueError, EOFError, TypeError) as error:
            raise DataError(f"the cached sample order {folder} can't be read ({error}): delete that folder") from error
        if self.whole_documents:
            expected = [sizes[0], sizes[3] + 1, sizes[0], sizes[3]]
        else:
            samples = len(self) if self._fim is None else sizes[3]
            expected = [len(self._lengths), samples, samples, samples]
        if sizes[:4] != expected or (self._fim is not None and sizes[4] != len(self._lengths)):
            raise DataError(
                f"the cached sample order {folder} has {sizes[0]} documents and {sizes[3]} samples instead of "
                f"{expected[0]} and {expected[3]}: delete that folder"
            )
        return index

    def _fim_index(self, fim: FillInTheMiddle, epoch: int) -> dict[str, NDArray[np.int64]]:
        """The documents of an epoch that FIM is applied to, and the lengths of all."""
        chosen, lengths = fim.chosen(len(self._lengths), epoch), self._lengths.copy()
        lengths[chosen] = [len(fim.apply(self._read(one), one, epoch)) for one in chosen.tolist()]
        return {"lengths": lengths, "chosen": chosen}

    def _read(self, document: int, offset: int = 0, count: int | None = None) -> NDArray[Any]:
        """Ids of a document as it is stored. Raises DataError at one outside the vocabulary."""
        begin = int(self.source.document_offsets[self._entry(self.documents, document)]) + offset
        ids = self.source.tokens[begin : begin + (int(self._lengths[document]) if count is None else count)]
        self.source.check_ids(ids, begin, self._vocab_size)
        return ids

    def _part(self, epoch: int, document: int, offset: int, most: int) -> NDArray[Any]:
        """At most `most` ids of a document of an epoch, from `offset` on. Raises DataError."""
        if self._fim is not None:
            chosen = self._index(epoch)["chosen"]
            at = int(np.searchsorted(chosen, document))
            if at < len(chosen) and chosen[at] == document:
                return self._fim.apply(self._read(document), document, epoch)[offset : offset + most]
        return self._read(document, offset, min(self._entry(self._lengths, document) - offset, most))

    def _epoch_of(self, sample_id: int) -> tuple[int, int]:
        """(epoch, number in it) of a sample."""
        if self._fim is None:
            return divmod(sample_id, len(self))
        while not self._ends or self._ends[-1] <= sample_id:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + len(self._index(len(self._ends))["shuffle"]))
        epoch = bisect_right(self._ends, sample_id)
        return epoch, sample_id - (self._ends[epoch - 1] if epoch else 0)

    def window(self, sample_id: int) -> Window:
        """The tokens of sample `sample_id` >= 0. Raises DataError at an id outside the vocabulary."""
        assert sample_id >= 0
        epoch, within = self._epoch_of(sample_id)
        index = self._index(epoch)
        number = self._entry(index["shuffle"], within)
        place = self._entry(index["first"], number)
        stop = self._entry(index["first"], number + 1) if self.whole_documents else len(index["documents"]) + 1
        offset = 0 if self.whole_documents else self._entry(index["offset"], number)
        tokens = np.zeros(self._seq_len + 1, dtype=np.int64)
        predicted = None if self.source.predicted is None else np.zeros(len(tokens), dtype=np.uint8)
        starts, origins, filled = [], [], 0
        while filled < len(tokens) and place < stop:
            document = self._entry(index["documents"], place)
            if self.whole_documents:
                offset = self._entry(index["offset"], place)
            if not 0 <= offset < self._entry(index.get("lengths", self._lengths), document):
                raise self._damaged()
            part = self._part(epoch, document, offset, len(tokens) - filled)
            tokens[filled : filled + len(part)] = part
            if predicted is not None and self.source.predicted is not None:
                begin = int(self.source.document_offsets[self.documents[document]]) + offset
                predicted[filled : filled + len(part)] = self.source.predicted[begin : begin + len(part)]
            starts.append(filled)
            origins.append((int(self.documents[document]), offset))
            filled, place, offset = filled + len(part), place + 1, 0
        if not filled:
            raise self._damaged()
        padding = len(tokens) - filled
        return Window(tokens, np.array(starts, dtype=np.int64), padding, predicted, tuple(origins))

    def _entry(self, values: NDArray[np.int64], place: int) -> int:
        if not 0 <= place < len(values):
            raise self._damaged()
        return int(values[place])

    def _damaged(self) -> DataError:
        return DataError(f"the cached sample order of {self.source.prefix} is damaged: delete {self._cache}")

    def batch(self, sample_ids: Sequence[int]) -> Batch:
        """The samples `sample_ids`, in that order."""
        return collate([self.window(sample_id) for sample_id in sample_ids], document_mask=self.document_mask)


def every_document(source: IndexedDataset) -> NDArray[np.int64]:
    """The numbers of all documents."""
    return np.arange(len(source), dtype=np.int64)
