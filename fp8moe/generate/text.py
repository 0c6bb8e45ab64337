"""Text in and out: prompts and chats as token ids, completions as text while they grow.

A token of a byte-level vocabulary is a string of bytes, so a character may come in several tokens: text is given out
when its characters are whole. Text that might be the beginning of a stop string is held back until that is known; a
stop string ends the completion and is no part of it.

A chat goes through the chat template beside the tokenizer (`data.chat_template`), of which names of special tokens are
encoded as such; in a prompt's text they are text, as in pretraining.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fp8moe.data.token_bytes import token_byte_strings
from fp8moe.data.tokenizer import KNOWN_END_OF_TEXT, load_tokenizer, num_ids
from fp8moe.errors import ConfigError, DataError
from fp8moe.limits import shown


class Vocabulary:
    """A tokenizer as generation uses it; `num_ids`: ids below it have a meaning, `ends`: tokens that end a text."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        """Raises DataError for a tokenizer.json that is missing, broken, or has more ids than `vocab_size`."""
        if not path.is_file():
            raise DataError(f"there is no tokenizer at {path}: name a tokenizer.json with --tokenizer PATH")
        self.path = path
        self.tokenizer: Tokenizer = load_tokenizer(path)
        self.num_ids = num_ids(self.tokenizer)
        if self.num_ids > vocab_size:
            raise DataError(
                f"{path} has ids up to {self.num_ids - 1} and the model's vocabulary, model.vocab_size, is "
                f"{vocab_size}: use the tokenizer that the model was trained with"
            )
        self.strings = token_byte_strings(self.tokenizer)
        known = (self.tokenizer.token_to_id(name) for name in KNOWN_END_OF_TEXT)
        self.end_of_text: int | None = next((found for found in known if found is not None), None)
        self.ends = frozenset() if self.end_of_text is None else frozenset({self.end_of_text})

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of a text; special: the names of special tokens stand for them."""
        self.tokenizer.encode_special_tokens = not special  # sic: false makes them of their names
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; characters that are cut are replaced."""
        return b"".join(self.strings[one] for one in ids).decode(errors="replace")

    def token(self, name: str) -> int:
        """The id of the token `name`. Raises ConfigError where there is none."""
        found: int | None = self.tokenizer.token_to_id(name)
        if found is None:
            special = [one.content for one in self.tokenizer.get_added_tokens_decoder().values() if one.special]
            raise ConfigError(
                f"--stop-token={shown(name)} is no token of the tokenizer, whose special tokens are "
                f"{', '.join(special[:12]) or 'none'}: use one of them, or --stop TEXT"
            )
        return found


class TextStream:
    """A completion's text as it grows; `text` is all of it so far, `ends` and `stops` say where it is over."""

    def __init__(self, vocabulary: Vocabulary, ends: frozenset[int], stops: Sequence[str]) -> None:
        self.text = ""
        self._strings, self._ends, self._stops = vocabulary.strings, ends, stops
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def add(self, token: int) -> tuple[str, bool]:
        """The text that a token brings, and whether it ends the completion."""
        if token in self._ends:
            return self.close(), True
        self._held += self._decoder.decode(self._strings[token])
        at = min((found for stop in self._stops if (found := self._held.find(stop)) >= 0), default=None)
        if at is not None:
            return self._give(at), True
        return self._give(len(self._held) - self._held_back()), False

    def close(self) -> str:
        """What was held back, when nothing more comes."""
        self._held += self._decoder.decode(b"", final=True)
        return self._give(len(self._held))

    def _give(self, count: int) -> str:
        given, self._held = self._held[:count], self._held[count:]
        self.text += given
        return given

    def _held_back(self) -> int:
        """Characters at the end that a stop string may begin with."""
        lengths = (n for stop in self._stops for n in range(len(stop) - 1, 0, -1) if self._held.endswith(stop[:n]))
        return max(lengths, default=0)


def check_stops(stops: Sequence[str]) -> None:
    """Raise ConfigError for a stop string without characters, which every text has."""
    if "" in stops:
        raise ConfigError("--stop='' has no characters and would end every text at once: give at least one")


def read_prompts(path: str) -> list[str]:
    """The prompts of a file: its whole text, or of a .jsonl the key `prompt` of every line. Raises DataError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise DataError(f"{path} can't be read ({reason}): name a text file, or a .jsonl with prompts") from error
    if not path.endswith(".jsonl"):
        return [text]
    return [str(row["prompt"]) for row in json_lines(path, text, {"prompt": str})]


def json_lines(path: str, text: str, keys: Mapping[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
    """The objects of JSON lines, each with `keys` of these types. Raises DataError with the line's number."""
    return [row for _, row in numbered_json_lines(path, text, keys)]


def numbered_json_lines(
    path: str, text: str, keys: Mapping[str, type | tuple[type, ...]]
) -> list[tuple[int, dict[str, Any]]]:
    """The same, each with the number of its line."""
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # JSON may hold other ends of lines as they are
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"line {number} of {path} is not JSON ({error}): write one object a line") from error
        for key, kinds in keys.items():
            if not isinstance(row, dict) or key not in row or not isinstance(row[key], kinds):
                found = f"has {', '.join(row) or 'no keys'}" if isinstance(row, dict) else "is no object"
                one = kinds[0] if isinstance(kinds, tuple) else kinds
                wanted = {str: "text", list: "a list", int: "a number or text"}[one]
                raise DataError(
                    f"line {number} of {path} needs the keys {', '.join(keys)}, {key} being {wanted}, and {found}: "
                    "write them on every line"
                )
        rows.append((number, row))
    if not rows:
        raise DataError(f"{path} has 0 lines and needs at least 1: write one object a line")
    return rows


def read_chat(path: str) -> list[dict[str, str]]:
    """The messages of a JSON file: a list of objects with `role` and `content`. Raises DataError."""
    try:
        messages = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = _why_no_json(error)
        raise DataError(f"{path} can't be read ({reason}): name a JSON file with a list of messages") from error
    is_list = isinstance(messages, list) and messages
    if not is_list or not all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in messages):
        raise DataError(f'{path} must hold a list of at least 1 message, {{"role": "user", "content": "..."}}')
    for number, one in enumerate(messages, start=1):
        if not all(isinstance(one[key], str) for key in ("role", "content")):
            raise DataError(f"message {number} of {path} must have text as its role and its content")
    return messages


def _why_no_json(error: Exception) -> str:
    """Why a file could not be read as one JSON document."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if not isinstance(error, json.JSONDecodeError):
        return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else "it is not JSON"
    if error.msg == "Extra data":
        return f"another JSON document begins in line {error.lineno}, and a chat is one"
    return f"it is not JSON, line {error.lineno}, column {error.colno}" if error.doc.strip() else "it is empty"
