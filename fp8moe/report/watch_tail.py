"""Reads what was appended to a file of JSON lines since the last look, so that a long run costs a watcher one new line.

A run appends whole lines (`train.json_lines`), but a reader may meet the middle of a write, and a killed run leaves
half a line: what has no end yet is left for the next look. A start that goes on from a checkpoint, and a rollback,
write the file anew without the steps that are done again; then another file has the name, or it is shorter, and all of
it is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

BLOCK = 1 << 20  # bytes read at once


class Tail:
    """The records of the file at `path`, which need not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None  # device and number of the file that was read
        self._offset = 0

    def look(self) -> tuple[bool, Iterator[dict[str, Any]]]:
        """Whether another file took the place of the one that was read, and the records that are new: then all of it.

        The records are to be read to their end before the next look. Raises OSError but for no file.
        """
        before, offset = self._file, self._offset
        self._file, self._offset = None, 0
        try:
            file = open(self._path, "rb")  # noqa: SIM115 - `_records` closes it
        except FileNotFoundError:
            return before is not None, iter(())
        status = os.fstat(file.fileno())
        self._file = (status.st_dev, status.st_ino)
        if before == self._file and status.st_size >= offset:
            self._offset = offset
            return False, self._records(file)
        return before is not None, self._records(file)

    def _records(self, file: BinaryIO) -> Iterator[dict[str, Any]]:
        with file:
            file.seek(self._offset)
            rest = b""
            while block := file.read(BLOCK):
                *lines, rest = (rest + block).split(b"\n")
                self._offset += sum(map(len, lines)) + len(lines)
                yield from filter(None, map(_record, lines))


def _record(line: bytes) -> dict[str, Any] | None:
    """The line's record; None for a line that is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
