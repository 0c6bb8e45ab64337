"""Indexed token files: the `.bin`/`.idx` layout of Megatron, which other trainers read and write too.

`PREFIX.bin` holds the token ids, one after the other. `PREFIX.idx` holds, little-endian:

    bytes  9   magic "MMIDIDX\\0\\0"
    uint64     version, 1
    uint8      type of the ids: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16
    uint64     number of sequences S
    uint64     number of document boundaries D (documents + 1)
    int32  S   length of each sequence in tokens
    int64  S   where each sequence starts in the .bin, in bytes
    int64  D   the sequence at which each document starts; the last one is S

(source: megatron/core/datasets/indexed_dataset.py in NVIDIA/Megatron-LM). The writer makes one sequence a document.
The reader requires sequences that follow each other without gaps, so that a document is one slice of one flat memory
map; it refuses float ids and the multimodal variant (one more byte a sequence). It checks the two files against each
other when they are opened, so a truncated copy is found before the first step.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fp8moe.data.durable import scratch_name, sync, unreadable
from fp8moe.data.identity import content_hash
from fp8moe.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, str] = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_HEADER = struct.Struct("<9sQBQQ")
_CHUNK = 1 << 22
_TILE = 128
_MAX_SEQUENCE = 2**31 - 1


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The type of stored ids: uint16 where every id below `vocab_size` fits, else int32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<i4")


def padded_vocabulary(size: int) -> int:
    """The vocabulary that a model of `size` ids should have: the next multiple of 128, of which tensor cores take whole
    tiles in the embedding and the head."""
    return -(-size // _TILE) * _TILE


class IndexedWriter:
    """Context manager that writes PREFIX.bin and PREFIX.idx: `write(ids)` any number of times, then `end_document()`.

    The files, and those that `add` writes, get their names only when the block ends without an exception; until then,
    and after a failure such as a full disk, earlier files of these names stay. The index is renamed last, because a
    .bin without an index is never read.
    """

    def __init__(self, prefix: str | os.PathLike[str], vocab_size: int) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = dtype_for(vocab_size)
        self.num_tokens = 0
        self._vocab_size = vocab_size
        self._lengths = array("q")
        self._open_length = 0
        self._scratch = {ending: scratch_name(Path(self.prefix + ending)) for ending in (".bin", ".idx")}
        self._bin: BinaryIO | None = None

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    def __enter__(self) -> IndexedWriter:
        self._bin = open(self._scratch[".bin"], "wb")
        return self

    def write(self, ids: NDArray[np.integer[Any]]) -> None:
        """Appends ids (1-D, any integer type) to the open document."""
        assert self._bin is not None
        if ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < self._vocab_size):
            raise DataError(
                f"{self.prefix}: ids from {ids.min()} to {ids.max()} are outside a vocabulary of {self._vocab_size}: "
                f"ids are from 0 to {self._vocab_size - 1}"
            )
        self._bin.write(ids.astype(self.dtype).tobytes())
        self._open_length += ids.size
        self.num_tokens += ids.size

    def add(self, ending: str, text: str) -> None:
        """Writes PREFIX + `ending` as well, in UTF-8."""
        scratch = scratch_name(Path(self.prefix + ending))
        self._scratch = {ending: scratch, **self._scratch}
        scratch.write_text(text, encoding="utf-8")

    def end_document(self) -> None:
        """Ends the open document; an empty one is dropped. Raises DataError above the format's 2^31 - 1 tokens."""
        if self._open_length > _MAX_SEQUENCE:
            raise DataError(
                f"{self.prefix}: document {self.num_documents} has {self._open_length} tokens, "
                f"the format holds at most {_MAX_SEQUENCE}: split it"
            )
        if self._open_length:
            self._lengths.append(self._open_length)
        self._open_length = 0

    def drop_document(self) -> None:
        """Takes back what was written of the open document."""
        assert self._bin is not None
        self._bin.seek(-self._open_length * self.dtype.itemsize, os.SEEK_CUR)
        self._bin.truncate()
        self.num_tokens -= self._open_length
        self._open_length = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._bin is not None
        try:
            self._bin.close()
            if kind is None:
                assert self._open_length == 0, "end_document() was not called"
                self._write_index()
                self._publish()
        finally:
            for path in self._scratch.values():
                path.unlink(missing_ok=True)

    def _write_index(self) -> None:
        code = next(code for code, name in DTYPES.items() if np.dtype(name) == self.dtype)
        lengths = np.array(self._lengths, dtype=np.int64)
        pointers = np.zeros_like(lengths)
        np.cumsum(lengths[:-1] * self.dtype.itemsize, out=pointers[1:])
        with open(self._scratch[".idx"], "wb") as index:
            index.write(_HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1))
            index.write(lengths.astype("<i4").tobytes())
            index.write(pointers.astype("<i8").tobytes())
            index.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())

    def _publish(self) -> None:
        for path in self._scratch.values():
            sync(path)
        Path(self.prefix + ".idx").unlink(missing_ok=True)  # an old index must never be read with a new .bin
        for ending, path in self._scratch.items():
            path.replace(self.prefix + ending)
        sync(Path(self.prefix).parent)


class IndexedDataset:
    """Reads PREFIX.bin and PREFIX.idx by memory map. Raises DataError when one is missing or broken.

    tokens: all ids, flat, in the type of the file.
    document_offsets: int64 [documents + 1], the token at which each document starts; the last one is `len(tokens)`.
    fingerprint: SHA-256 of path, sizes, modification times and first MB of both files, for names in caches.
    predicted: as long as `tokens`, 0 where a token is not predicted; None: all are (`chat_tokens` has others).
    """

    tokens: NDArray[np.integer[Any]]
    document_offsets: NDArray[np.int64]
    predicted: NDArray[np.uint8] | None = None

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self.bin_path, self.idx_path = Path(self.prefix + ".bin"), Path(self.prefix + ".idx")
        try:
            self._open()
        except OSError as error:
            raise unreadable(error.filename or f"{self.prefix}.bin or .idx", error) from error

    def _open(self) -> None:
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise DataError(_missing(path, Path(self.prefix)))
        dtype, lengths, pointers, boundaries = _read_index(self.idx_path)
        num_tokens = _check_sequences(self.idx_path, lengths, pointers, boundaries, dtype.itemsize)
        expected, actual = num_tokens * dtype.itemsize, self.bin_path.stat().st_size
        if actual != expected:
            raise DataError(f"{self.bin_path} has {actual} bytes and its index says {expected}: copy both files again")
        if num_tokens == 0:
            raise DataError(f"{self.bin_path} has 0 tokens: a data set needs at least 1 token")
        self.tokens = np.memmap(self.bin_path, dtype=dtype, mode="r")
        starts = np.append(pointers // dtype.itemsize, num_tokens)
        self.document_offsets = np.ascontiguousarray(starts[boundaries], dtype=np.int64)
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.document_offsets) - 1

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(os.fspath(self.bin_path.resolve()).encode())
        for path in (self.idx_path, self.bin_path):
            status = path.stat()
            digest.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
            with open(path, "rb") as handle:
                digest.update(handle.read(1 << 20))
        return digest.hexdigest()

    def content(self) -> str:
        """A hash of content alone, whatever the path: equal for copies of the files. Raises DataError."""
        return f"{content_hash(self.idx_path)}-{content_hash(self.bin_path)}"

    def check_vocabulary(self, vocab_size: int) -> None:
        """Reads every id once. Raises DataError at the first one outside [0, vocab_size)."""
        limits = np.iinfo(self.tokens.dtype)
        if limits.min == 0 and limits.max < vocab_size:
            return
        for start in range(0, len(self.tokens), _CHUNK):
            self.check_ids(self.tokens[start : start + _CHUNK], start, vocab_size)

    def check_ids(self, ids: NDArray[np.integer[Any]], start: int, vocab_size: int) -> None:
        """Raises DataError at the first of `ids`, read at token `start`, outside [0, vocab_size)."""
        if int(ids.min()) >= 0 and int(ids.max()) < vocab_size:
            return
        at = int(np.argmax((ids < 0) | (ids >= vocab_size)))
        found = int(ids[at])
        # The largest of all, or the next run would stop at the next larger one.
        chunks = range(0, len(self.tokens), _CHUNK) if found >= 0 else ()
        largest = max((int(self.tokens[one : one + _CHUNK].max()) for one in chunks), default=found)
        advice = f"ids go up to {largest}, use model.vocab_size={padded_vocabulary(largest + 1)}"
        advice = advice if found >= 0 else "an id is at least 0: write the file again"
        raise DataError(
            f"{self.bin_path}: token {start + at} has id {found}, outside a vocabulary of {vocab_size}: {advice}"
        )


def _missing(path: Path, prefix: Path) -> str:
    """The sentence on a token file that is not there, by what lies at its prefix."""
    if prefix.suffix in (".bin", ".idx") and prefix.is_file():
        return f"{prefix} is one of two files, which are given by their PREFIX: use {prefix.with_suffix('')}"
    if prefix.is_file():
        return (
            f"{prefix} holds no token ids: fp8moe tokenize --input {prefix} --output PREFIX makes token files of text, "
            "and fp8moe sft reads conversations"
        )
    inside = sorted(prefix.glob("[!.]*.idx")) if prefix.is_dir() and not path.exists() else []
    if inside:
        return f"{prefix} is a folder and token files are given by their PREFIX: use {inside[0].with_suffix('')}"
    return (
        f"{path} does not exist: a data set is two files, PREFIX.bin and PREFIX.idx, given as PREFIX (`fp8moe "
        "tokenize` writes them)"
    )


def _read_index(
    path: Path,
) -> tuple[np.dtype[Any], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """(type of the ids, sequence lengths, sequence pointers in bytes, document boundaries), all memory-mapped."""
    size = path.stat().st_size
    with open(path, "rb") as handle:
        head = handle.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise DataError(
            f"{path} has {size} bytes and its header alone has {_HEADER.size}: the file is truncated, copy it again"
        )
    magic, version, code, num_sequences, num_boundaries = _HEADER.unpack(head)
    if magic != MAGIC:
        raise DataError(f"{path} starts with {magic!r} instead of {MAGIC!r}: it is not the index of a token file")
    if version != VERSION:
        raise DataError(f"{path} has version {version} and only version {VERSION} can be read: write it again")
    if code not in DTYPES:
        raise DataError(f"{path} has type code {code} and token ids have one of {sorted(DTYPES)}: write integer ids")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if size == expected + num_sequences and num_sequences:
        raise DataError(
            f"{path} has a mode for each of its {num_sequences} sequences (multimodal data): only text can be read"
        )
    if size != expected:
        raise DataError(f"{path} has {size} bytes and its header says {expected}: the file is broken, copy it again")
    if num_sequences == 0:
        raise DataError(f"{path} has 0 sequences and so 0 tokens: a data set needs at least 1 token")
    raw = np.memmap(path, dtype=np.uint8, mode="r", offset=_HEADER.size)
    lengths = raw[: 4 * num_sequences].view("<i4")
    pointers = raw[4 * num_sequences : 12 * num_sequences].view("<i8")
    boundaries = raw[12 * num_sequences :].view("<i8")
    return np.dtype(DTYPES[code]), lengths, pointers, boundaries


def _check_sequences(
    path: Path,
    lengths: NDArray[np.int32],
    pointers: NDArray[np.int64],
    boundaries: NDArray[np.int64],
    itemsize: int,
) -> int:
    """Checks that sequences follow each other without gaps and documents cover them; returns the number of tokens."""
    end = 0
    for start in range(0, len(lengths), _CHUNK):
        part = lengths[start : start + _CHUNK].astype(np.int64)
        ends = end + np.cumsum(part) * itemsize
        expected = ends - part * itemsize
        wrong = (pointers[start : start + _CHUNK] != expected) | (part < 0)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise DataError(
                f"{path}: sequence {start + at} of {part[at]} tokens starts at byte {pointers[start + at]} instead of "
                f"{expected[at]}: the file is broken, write it again"
            )
        end = int(ends[-1])
    ordered = all(
        bool((np.diff(boundaries[start : start + _CHUNK + 1]) >= 0).all())
        for start in range(0, len(boundaries), _CHUNK)
    )
    if len(boundaries) == 0 or boundaries[0] != 0 or boundaries[-1] != len(lengths) or not ordered:
        raise DataError(
            f"{path}: the document boundaries don't run from 0 to {len(lengths)} in order: "
            "the file is broken, write it again"
        )
    return end // itemsize
