"""The documents of many files as one stream of pieces: empty ones are left out, exact duplicates if that is asked for.

A duplicate is a document whose text has the BLAKE2b hash of 16 bytes of an earlier one, in the order of the input; the
first one stays. Near duplicates are not looked for. The hashes take about 100 bytes of memory a document. A document in
several pieces is known as a duplicate only at its end, when pieces of it are encoded already: `is_dropped` says so to
the writer, which takes them back.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from fp8moe.data.readers import read_pieces


class Intake:
    """Reads documents. empty, duplicates: documents left out so far."""

    def __init__(self, files: list[Path], text_key: str, drop_duplicates: bool) -> None:
        self.empty = self.duplicates = 0
        self._files, self._text_key, self._drop = files, text_key, drop_duplicates
        self._seen: set[bytes] = set()
        self._dropped: deque[bool] = deque()

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """The pieces (text, ends its document) of all documents that have text. Raises DataError."""
        for file in self._files:
            digest, is_whole = None, True
            for text, ends in read_pieces(file, self._text_key):
                if is_whole and ends and not text:
                    self.empty += 1
                    continue
                if self._drop:
                    digest = digest or hashlib.blake2b(digest_size=16)
                    digest.update(text.encode())
                is_duplicate = digest is not None and ends and self._is_known(digest.digest())
                if not (is_duplicate and is_whole):
                    if ends:
                        self._dropped.append(is_duplicate)
                    yield text, ends
                digest, is_whole = (None, True) if ends else (digest, False)

    def _is_known(self, key: bytes) -> bool:
        known = key in self._seen
        self.duplicates += known
        self._seen.add(key)
        return known

    def is_dropped(self) -> bool:
        """Whether the next document of those that `pieces` has ended, in order, is to be taken back."""
        return self._dropped.popleft()
