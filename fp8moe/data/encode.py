"""Encodes text in parallel processes, part by part; finished parts are kept, so that a run that was killed goes on.

The reader cuts the stream of pieces into parts of about 4 million characters, by the text alone. Processes encode them
in any order; they are taken in the order of the text, so the result has the same bytes for every number of processes.
A finished part is a file named by a hash of its text and tokenizer. After a kill the same command reads the text again,
which is fast beside encoding, and encodes only what has no file; a part of changed text has another name and is never
taken by mistake. Text of one part is encoded here, without a file.

Processes rather than the threads of the tokenizers library: its threads leave the cores idle while Python reads text
and takes ids out. They are spawned, not forked, since threads of that library may be running; each ends by itself when
its parent is gone.
"""

from __future__ import annotations

import hashlib
import io
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fp8moe.data.durable import publish, scratch_name
from fp8moe.data.indexed import dtype_for
from fp8moe.data.tokenizer import encode_pieces, num_ids
from fp8moe.errors import DataError

PART_CHARS = 4 << 20
_ARRAYS = ("ids", "lengths", "sizes", "ends")

Piece = tuple[str, bool]


@dataclass(frozen=True)
class Encoded:
    """A part: ids, uint16 or int32, of all pieces; per piece int64 tokens, int64 bytes of text, and whether it ends."""

    ids: NDArray[Any]
    lengths: NDArray[np.int64]
    sizes: NDArray[np.int64]
    ends: NDArray[np.bool_]

    def pieces(self) -> Iterator[tuple[NDArray[Any], int, bool]]:
        """(ids, bytes of text, ends its document) of each piece."""
        place = 0
        for length, size, ends in zip(self.lengths.tolist(), self.sizes.tolist(), self.ends.tolist(), strict=True):
            yield self.ids[place : place + length], size, ends
            place += length


class Encoder:
    """Encodes parts, see the top of this module. reused: how many were there; folder: where parts are kept."""

    def __init__(self, tokenizer: Tokenizer, end_of_text: int, workers: int, folder: Path) -> None:
        self.reused = 0
        self.folder = folder
        self._tokenizer, self._end, self._workers = tokenizer, end_of_text, workers
        self._key = hashlib.blake2b(f"{end_of_text} {tokenizer.to_str()}".encode(), digest_size=16).digest()

    def encode(self, pieces: Iterable[Piece]) -> Iterator[Encoded]:
        """The parts in order. Raises OSError where the folder can't be written, DataError where a process ended."""
        parts = _parts(pieces)
        first, second = next(parts, None), next(parts, None)
        if first is None:
            return
        if second is None:
            yield _encode(self._tokenizer, first, self._end)
            return
        self.folder.mkdir(exist_ok=True)
        known = (part for part in (first, second) if part)
        try:
            yield from self._in_order(known, parts)
        except BrokenProcessPool as error:
            raise DataError(
                f"one of {self._workers} encoding processes ended, as when memory runs out: use fewer --workers; "
                f"what was encoded is kept in {self.folder}"
            ) from error

    def _in_order(self, *streams: Iterable[list[Piece]]) -> Iterator[Encoded]:
        waiting: deque[tuple[Path, Future[None] | None]] = deque()
        pool = self._pool() if self._workers > 1 else None
        try:
            for part in (part for stream in streams for part in stream):
                path = self.folder / f"{self._name(part)}.npz"
                if path.is_file():
                    self.reused += 1
                    waiting.append((path, None))
                elif pool is None:
                    _save(_encode(self._tokenizer, part, self._end), path)
                    waiting.append((path, None))
                else:
                    waiting.append((path, pool.submit(_work, part, self._end, path)))
                if len(waiting) > 2 * self._workers:
                    yield _taken(*waiting.popleft())
            while waiting:
                yield _taken(*waiting.popleft())
        finally:
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    def _pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self._workers,
            mp_context=get_context("spawn"),
            initializer=_start,
            initargs=(self._tokenizer.to_str(),),
        )

    def _name(self, part: list[Piece]) -> str:
        digest = hashlib.blake2b(self._key, digest_size=16)
        for text, ends in part:
            content = text.encode()
            digest.update(f"{len(content)} {ends} ".encode())
            digest.update(content)
        return digest.hexdigest()


def _parts(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    part: list[Piece] = []
    chars = 0
    for piece in pieces:
        part.append(piece)
        chars += len(piece[0]) + 1  # documents of one character must end a part as well
        if chars >= PART_CHARS:
            yield part
            part, chars = [], 0
    if part:
        yield part


def _encode(tokenizer: Tokenizer, part: list[Piece], end_of_text: int) -> Encoded:
    arrays = [ids for ids, _ in encode_pieces(tokenizer, part, end_of_text)]
    return Encoded(
        np.concatenate(arrays).astype(dtype_for(num_ids(tokenizer))),
        np.array([len(ids) for ids in arrays], dtype=np.int64),
        np.array([len(text.encode()) for text, _ in part], dtype=np.int64),
        np.array([ends for _, ends in part], dtype=np.bool_),
    )


_tokenizer: Tokenizer | None = None  # of a worker process


def _start(tokenizer: str) -> None:
    """Prepare a worker process: its tokenizer, one thread, and an end when its parent has ended."""
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent ends them
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core
    _tokenizer = Tokenizer.from_str(tokenizer)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _work(part: list[Piece], end_of_text: int, path: Path) -> None:
    assert _tokenizer is not None
    _save(_encode(_tokenizer, part, end_of_text), path)


def _save(encoded: Encoded, path: Path) -> None:
    content = io.BytesIO()
    np.savez(content, **{name: getattr(encoded, name) for name in _ARRAYS})
    scratch = scratch_name(path)
    try:
        scratch.write_bytes(content.getbuffer())
        publish(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _taken(path: Path, future: Future[None] | None) -> Encoded:
    if future is not None:
        future.result()
    try:
        with np.load(path) as arrays:  # which refuses pickles
            return Encoded(*(arrays[name] for name in _ARRAYS))
    except Exception as error:  # zipfile and numpy raise many kinds for a damaged file
        raise DataError(f"{path} can't be read ({error}): delete {path.parent}") from error
