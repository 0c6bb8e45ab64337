"""A file that is hashed from memory as it is written, so that nothing is read back for its hash."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import xxhash


@dataclass(frozen=True)
class WrittenFile:
    """Size and XXH3-128 of the bytes that a file was given."""

    size: int
    xxh3: str


class HashedFile:
    """A file that is hashed as it is written, and stored for good when it is closed; `sync`: by fsync."""

    def __init__(self, handle: Any, *, sync: bool, chunk: int) -> None:
        self._handle, self._sync, self._chunk = handle, sync, chunk
        self._digest, self._size = xxhash.xxh3_128(), 0

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`, in pieces: a remote file copies each into its buffer, and the hash leaves it in the cache."""
        view = memoryview(data)
        for start in range(0, len(view), self._chunk):
            piece = view[start : start + self._chunk]
            self._digest.update(piece)
            self._handle.write(piece)
        self._size += len(view)

    def close(self) -> WrittenFile:
        """Flush, synchronize, close."""
        if self._sync:
            self._handle.flush()
            os.fsync(self._handle.fileno())
        self._handle.close()
        return WrittenFile(self._size, self._digest.hexdigest())

    def fill(self, content: bytes) -> WrittenFile:
        """Write `content` and close."""
        self.write(content)
        return self.close()
