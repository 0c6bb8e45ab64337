"""Readers of text: files become streams of pieces (text, ends its document), for `fp8moe tokenize`.

At most a million characters, one JSON line, or a few hundred rows are in memory. By the name's ending:
- `.txt`, `.text`, `.md`, and any other file that is named itself: one document, cut at line ends about every million
  characters, so a file may be larger than memory;
- `.jsonl`, `.ndjson`: a document a line; a `.json` as well if its first line is a whole JSON object;
- these with `.gz` or `.zst` behind;
- `.parquet`, and the `.arrow` files of a Hugging Face data set (`save_to_disk`): a document a row (`readers_arrow`).

A run of more than 4,096 characters without white space, or of white space alone, is cut after each 4,096, since BPE
takes quadratic time in the length of a run: the ids of such text differ from those of the uncut text at the cuts, its
bytes do not; no other text is concerned. Text is kept byte for byte: no newline is translated, nothing is normalized,
and text that is not UTF-8 is an error that names the place. An empty document is one empty piece. What a folder holds
besides is passed over and named. Of a folder in the layout of the hub, or that `save_to_disk` wrote with several
splits, the train split is read (`hub_layout`): else the test split would be trained on.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from fp8moe.data.compressed import COMPRESSED_ENDINGS, open_text
from fp8moe.data.durable import unreadable
from fp8moe.data.hub_layout import TrainSplit, train_split
from fp8moe.data.readers_arrow import RECORDS, TABLE_ENDINGS, files_of_dataset, read_column, saved_train_split
from fp8moe.errors import DataError

TEXT_ENDINGS = (".txt", ".text", ".md")
JSON_ENDINGS = (".jsonl", ".ndjson")
PIECE_CHARS = 1 << 20
RUN_CHARS = 4096
_LINE_CHARS = 1 << 16
_FIRST_LINE_CHARS = 1 << 26
_RUN = re.compile(rf"\S{{{RUN_CHARS}}}|\s{{{RUN_CHARS}}}")
_LONG_RUN = re.compile(rf"\S{{{RUN_CHARS}}}(?=\S)|\s{{{RUN_CHARS}}}(?=\s)")


@dataclass
class Found:
    """The files that were found, each once, and those of folders that can't be read as text, in the same order.

    splits: folders of which other splits were left out.
    """

    files: list[Path] = field(default_factory=list)
    passed_over: list[Path] = field(default_factory=list)
    splits: list[TrainSplit] = field(default_factory=list)


def find_files(inputs: Iterable[str]) -> Found:
    """The files in `inputs`, and those with a known ending below the folders in `inputs` (sorted), each file once.

    Raises DataError where one does not exist, or a folder below can't be listed: its text would be missing silently.
    """
    found = Found()
    for name in inputs:
        path = Path(name)
        try:
            if path.is_dir():
                _search(path, found)
            elif path.is_file():
                found.files.append(path)
            else:
                state = "is neither a file nor a folder" if path.exists() else "does not exist"
                raise DataError(f"{name} {state}: give text files, .jsonl files or folders of them")
        except OSError as error:
            raise unreadable(error.filename or name, error) from error
    if not found.files:
        endings = ", ".join((*TEXT_ENDINGS, *JSON_ENDINGS, ".json", *TABLE_ENDINGS))
        others = f" ({named(found.passed_over)})" if found.passed_over else ""
        raise DataError(
            f"0 files found in {', '.join(map(str, inputs))}{others}: a folder must hold files ending in {endings}"
        )
    files, passed_over = (list(dict.fromkeys(part)) for part in (found.files, found.passed_over))
    return Found(files, passed_over, found.splits)


def named(paths: list[Path], most: int = 5) -> str:
    """How many files, and the names of the first ones."""
    rest = f" and {len(paths) - most} more" if len(paths) > most else ""
    return f"{len(paths)} other {'file' if len(paths) == 1 else 'files'}: {', '.join(map(str, paths[:most]))}{rest}"


def _search(root: Path, found: Found) -> None:
    """Adds the files below `root`, sorted; links to folders are not followed. Raises OSError and DataError."""

    def refuse(error: OSError) -> None:
        raise error

    taken: list[tuple[Path, int, Path]] = []  # by name, those of a data set in its own order
    others: list[Path] = []
    for folder, below, names in os.walk(root, onerror=refuse):
        saved, known = saved_train_split(Path(folder)), files_of_dataset(Path(folder))
        if saved is not None:
            below[:] = [name for name in below if name not in saved.others]
            found.splits.append(saved)
        if known is not None:  # what lies beside them is the library's own
            taken.extend((Path(folder), place, file) for place, file in enumerate(known))
            continue
        for file in (Path(folder, name) for name in names if name not in RECORDS):
            if _is_readable(file):
                taken.append((file, 0, file))
            elif file.is_file():
                others.append(file)
    split = train_split(root, [file for name, _, file in sorted(taken) if name == file], _is_text)
    if split is not None:
        kept = set(split.files)
        taken = [one for one in taken if one[0] != one[2] or one[2] in kept]
        found.splits.append(split)
    found.files.extend(file for _, _, file in sorted(taken))
    found.passed_over.extend(sorted(others))


def _is_readable(file: Path) -> bool:
    """Whether this is a file that `read_pieces` knows by its name, or by its first line. Raises OSError."""
    kind = _kind(file)
    if not file.is_file():
        return False
    if kind == ".json":
        try:
            return is_json_lines(file)
        except (DataError, UnicodeDecodeError, EOFError, zlib.error):
            return False
    is_table = file.suffix.lower() in TABLE_ENDINGS  # tables are compressed inside
    return is_table or _is_text(file) or kind in JSON_ENDINGS


def _is_text(file: Path) -> bool:
    return _kind(file) in TEXT_ENDINGS


def _kind(path: Path) -> str:
    """The ending of a file's name in lower case, that of a compression apart."""
    return Path(path.stem if path.suffix.lower() in COMPRESSED_ENDINGS else path.name).suffix.lower()


def is_json_lines(path: Path) -> bool:
    """Whether the first line with content is a whole JSON object. Raises DataError, UnicodeDecodeError, OSError."""
    with open_text(path, "\n") as handle:
        while (line := handle.readline(_FIRST_LINE_CHARS)) and not line.strip():
            pass
    try:
        return line.lstrip().startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def read_pieces(path: Path, text_key: str = "text") -> Iterator[tuple[str, bool]]:
    """The pieces of one file; `text_key`: the key of a JSON line, or the column, that has the text.

    Raises DataError, naming the place, at text that can't be read.
    """
    kind = _kind(path)
    try:
        if path.suffix.lower() in TABLE_ENDINGS:
            for text in read_column(path, text_key):
                yield from _cut(text, True)
            return
        if kind == ".json" and not is_json_lines(path):
            raise DataError(
                f"{path} is not JSON lines (its first line is no whole JSON object): write one object a line, "
                "or end its name in .txt if it is to be read as text"
            )
        is_json = kind in (*JSON_ENDINGS, ".json")
        # "": no newline is translated; a JSON line may also end in \r\n, JSON ignores the \r.
        with open_text(path, "\n" if is_json else "") as handle:
            yield from _json_documents(handle, path, text_key) if is_json else _text_document(handle)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"{path} is not UTF-8 text (byte 0x{byte:02x}, {error.reason}): convert it to UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} can't be decompressed ({error}): the file is cut off or damaged, copy it again") from (
            error
        )
    except OSError as error:
        raise unreadable(path, error) from error


def _text_document(handle: TextIO) -> Iterator[tuple[str, bool]]:
    previous = ""
    # A file may be one endless line: at most _LINE_CHARS are read to reach a line end.
    while piece := handle.read(PIECE_CHARS):
        piece += "" if piece.endswith("\n") else handle.readline(_LINE_CHARS)
        if previous:
            yield from _cut(previous, False)
        previous = piece
    yield from _cut(previous, True)


def _cut(text: str, ends: bool) -> Iterator[tuple[str, bool]]:
    """The text in pieces, cut after every RUN_CHARS of a run without white space, or of nothing else."""
    start = 0
    for run in _LONG_RUN.finditer(text):
        yield text[start : run.end()], False
        start = run.end()
    yield text[start:], ends


def is_inside_run(piece: str) -> bool:
    """Whether a piece is from within a long run."""
    return _RUN.fullmatch(piece) is not None


def _json_documents(handle: TextIO, path: Path, text_key: str) -> Iterator[tuple[str, bool]]:
    for number, line in enumerate(handle, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path} line {number} is not JSON ({error.msg.removesuffix(' at')} at column {error.colno}): "
                "write one JSON object a line"
            ) from error
        except (RecursionError, ValueError) as error:  # nested too deep; a number of more than 4,300 digits
            raise DataError(f"{path} line {number} can't be read as JSON ({error}): remove that line") from error
        if not isinstance(record, dict):
            raise DataError(
                f"{path} line {number} is of type {type(record).__name__} and must be an object: write "
                f'{{"{text_key}": ...}} a line'
            )
        if text_key not in record:
            raise DataError(f"{path} line {number} has no key {text_key!r}, {_has_instead(record)}")
        text = record[text_key]
        if not isinstance(text, str):
            raise DataError(
                f"{path} line {number}: the value of {text_key!r} is of type {type(text).__name__}, it must be a string"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise DataError(
                f"{path} line {number}: character {error.start} is half of a surrogate pair: remove it or write both"
            ) from error
        yield from _cut(text, True)


def _has_instead(record: dict[str, object]) -> str:
    """What a line without the key of the text has, and what to do."""
    keys = ", ".join(sorted(record))
    keys = keys if len(keys) <= 200 else f"{keys[:200]}..."
    if isinstance(record.get("messages"), list):
        return f"it has {keys}: fp8moe sft learns from conversations as they are"
    texts = {key: len(value) for key, value in record.items() if isinstance(value, str) and len(key) <= 200}
    use = f" {shlex.quote(max(texts, key=lambda key: texts[key]))}" if texts else ""
    return f"it has {keys or 'none'}: use --text-key{use}"
