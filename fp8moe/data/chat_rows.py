"""Conversations of files: JSON lines, compressed ones as well, and parquet; a row is one conversation.

A row has `messages`, a list of {"role": ..., "content": ...}, or ShareGPT's `conversations` of {"from": ..., "value":
...}. Roles are system, developer, user, assistant and tool; ShareGPT's names of them are translated. Other keys of a
message go to the template as they are. A row that is no conversation ends the reading, by its file and number: half of
a data set that is not what it was taken for is worth less than the sentence.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fp8moe.data.compressed import COMPRESSED_ENDINGS, open_text
from fp8moe.data.durable import unreadable
from fp8moe.data.readers_arrow import TABLE_ENDINGS, read_rows
from fp8moe.errors import DataError
from fp8moe.limits import shown

ROLES = ("system", "developer", "user", "assistant", "tool")
CHAT_ENDINGS = (".jsonl", ".ndjson", ".json", *TABLE_ENDINGS)
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
_MESSAGES, _SHAREGPT = "messages", "conversations"
_NO_TEXT = "\ufdd0\ufdd1"  # noncharacters, with which templates mark answers

Conversation = list[dict[str, Any]]


def is_chat_file(path: Path) -> bool:
    """Whether the name is that of a file of conversations."""
    name = path.stem if path.suffix.lower() in COMPRESSED_ENDINGS else path.name
    return Path(name).suffix.lower() in CHAT_ENDINGS


def read_conversations(path: Path) -> Iterator[tuple[str, Conversation]]:
    """(place of the row, for messages; its messages) of each row. Raises DataError, naming the place; also where there
    is no row."""
    is_empty = True
    for place, row in _rows(path):
        is_empty = False
        yield place, _conversation(row, place)
    if is_empty:
        raise DataError(f"{path} has 0 rows and a chat file needs at least 1: write one conversation a line")


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    if path.is_dir():
        raise DataError(f"{path} is a folder and a chat is a file: name its files, of several splits those of train")
    if path.suffix.lower() in TABLE_ENDINGS:
        for number, row in enumerate(read_rows(path, (_MESSAGES, _SHAREGPT)), start=1):
            yield f"{path} row {number}", row
        return
    try:
        with open_text(path, "\n") as handle:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    yield f"{path} line {number}", _parsed(line, f"{path} line {number}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}): convert it to UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} can't be decompressed ({error}): it is cut off or damaged, copy it again") from error
    except OSError as error:
        raise unreadable(path, error) from error


def _parsed(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = (
            f"{error.msg.removesuffix(' at')} at column {error.colno}"
            if isinstance(error, json.JSONDecodeError)
            else error
        )
        raise DataError(f"{place} is not JSON ({reason}): write one conversation a line") from error


def _conversation(row: Any, place: str) -> Conversation:
    """The messages of a row, with roles and contents checked. Raises DataError."""
    is_row = isinstance(row, Mapping)
    key = next((name for name in (_MESSAGES, _SHAREGPT) if is_row and row.get(name) is not None), None)
    if key is None:
        there = f"has {', '.join(map(str, row)) or 'none'}" if is_row else f"is {shown(row)}"
        raise DataError(
            f"{place} has no {_MESSAGES}, it {there[:200]}: write "
            f'{{"{_MESSAGES}": [{{"role": "user", "content": ...}}, {{"role": "assistant", "content": ...}}]}}'
        )
    messages = row[key]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: {key} is {shown(messages)} and must be a list of at least 1 message")
    return [_message(one, f"{place}, message {number}") for number, one in enumerate(messages, start=1)]


def _message(one: Any, place: str) -> dict[str, Any]:
    if not isinstance(one, Mapping):
        raise DataError(f'{place} is {shown(one)} and must be an object: write {{"role": ..., "content": ...}}')
    role, content = one.get("role", one.get("from")), one.get("content", one.get("value"))
    role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise DataError(f"{place} has the role {shown(role)}: use {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    if not isinstance(content, str):
        raise DataError(f"{place} has the content {shown(content)} ({type(content).__name__}): it must be a string")
    if any(mark in content for mark in _NO_TEXT) or not _is_unicode(content):
        raise DataError(f"{place} has half of a surrogate pair, or U+FDD0 or U+FDD1, which no text has: remove it")
    more = {key: value for key, value in one.items() if value is not None and key not in ("from", "value")}
    return more | {"role": role, "content": content}


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a pair
        return False
    return True
