"""Text files and JSON lines as a stream of pieces of documents, never holding more than a piece.

A piece is (text, ends its document). A `.jsonl` file holds a document a line, whole in one piece; any other file is one
document, cut at line ends about every million characters, so that a file larger than memory is read as easily. Bytes
are kept: no newline is translated, nothing is normalised, and what is not UTF-8 is an error that says where.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from fp8moe.errors import DataError

TEXT_ENDINGS = (".txt", ".text", ".md")
JSON_ENDINGS = (".jsonl", ".ndjson")
PIECE_CHARS = 1 << 20
_LINE_CHARS = 1 << 16


def find_files(inputs: Iterable[str]) -> list[Path]:
    """The files named, and below the folders named those with a known ending, sorted; each once, in the order given."""
    found: dict[Path, None] = {}
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            known = (file for file in path.rglob("*") if file.suffix.lower() in TEXT_ENDINGS + JSON_ENDINGS)
            found.update(dict.fromkeys(sorted(file for file in known if file.is_file())))
        elif path.is_file():
            found[path] = None
        else:
            raise DataError(f"{name} does not exist: name text files, .jsonl files or folders of them")
    if not found:
        endings = " ".join(TEXT_ENDINGS + JSON_ENDINGS)
        raise DataError(f"0 files found in {', '.join(map(str, inputs))}: a folder is searched for {endings}")
    return list(found)


def read_pieces(path: Path, json_key: str = "text") -> Iterator[tuple[str, bool]]:
    """The pieces of one file; empty documents give none. Raises DataError, naming the place, at text it can't read."""
    is_json = path.suffix.lower() in JSON_ENDINGS
    try:
        # newline="": the text as it is; a JSON line may end in \r\n too, JSON ignores the \r.
        with open(path, encoding="utf-8", newline="" if not is_json else "\n") as handle:
            yield from _json_documents(handle, path, json_key) if is_json else _text_document(handle)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"{path} is not UTF-8 text (byte 0x{byte:02x}, {error.reason}): convert it first") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error


def _text_document(handle: TextIO) -> Iterator[tuple[str, bool]]:
    waiting = ""
    # A line without end must not be read whole: at most _LINE_CHARS are added to reach a line end.
    while piece := handle.read(PIECE_CHARS):
        piece += "" if piece.endswith("\n") else handle.readline(_LINE_CHARS)
        if waiting:
            yield waiting, False
        waiting = piece
    if waiting:
        yield waiting, True


def _json_documents(handle: TextIO, path: Path, json_key: str) -> Iterator[tuple[str, bool]]:
    for number, line in enumerate(handle, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number} is not JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(record, dict) or json_key not in record:
            keys = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
            raise DataError(f"{path} line {number} has no key {json_key!r}, it has {keys or 'none'}: use --json-key")
        text = record[json_key]
        if not isinstance(text, str):
            raise DataError(f"{path} line {number}: {json_key!r} is a {type(text).__name__}, not a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise DataError(f"{path} line {number}: character {error.start} is half of a surrogate pair") from error
        if text:
            yield text, True
