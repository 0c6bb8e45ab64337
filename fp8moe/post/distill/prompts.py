"""The prompts of a JSON lines file: `prompt`, and what verifiers need beside it, `answer` or `tests`.

A prompt's id is a hash of its whole line, so that samples are found again when lines move, and made anew when the
prompt, its answer or its tests change. The same line twice is two prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8moe.errors import DataError
from fp8moe.generate.text import json_lines
from fp8moe.post.verify.verdict import NamedVerifier


@dataclass(frozen=True)
class Prompt:
    """number: of its line among those with text, from 1. row: all that the line holds."""

    id: str
    number: int
    row: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The problem."""
        return str(self.row["prompt"])


def read_prompts(path: str, verifiers: Sequence[NamedVerifier] = ()) -> list[Prompt]:
    """The prompts of a file. Raises DataError: unreadable, no prompt, or a line lacks what a verifier needs."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise DataError(f"{path} can't be read ({reason}): name a file of JSON lines with a key prompt") from error
    prompts, seen = [], Counter[str]()
    for number, row in enumerate(json_lines(path, text, {"prompt": str}), start=1):
        _check(path, number, row, verifiers)
        digest = hashlib.blake2b(json.dumps(row, sort_keys=True).encode(), digest_size=8).hexdigest()
        seen[digest] += 1
        prompts.append(Prompt(digest if seen[digest] == 1 else f"{digest}-{seen[digest]}", number, row))
    return prompts


def _check(path: str, number: int, row: Mapping[str, Any], verifiers: Sequence[NamedVerifier]) -> None:
    if not row["prompt"].strip():
        raise DataError(f"prompt {number} of {path} is empty: give at least one character")
    if row["prompt"].encode("utf-8", "replace").decode() != row["prompt"]:
        raise DataError(f"prompt {number} of {path} has half of a surrogate pair, which no text has: remove it")
    for verifier in verifiers:
        for key in verifier.needs:
            if key not in row:
                raise DataError(f"prompt {number} of {path} has no {key}, which --verify {verifier.name} needs: add it")
    if not isinstance(row.get("answer", ""), str | int | float) or isinstance(row.get("answer"), bool):
        raise DataError(f"prompt {number} of {path} has an answer that is neither text nor a number: write it as text")
    tests = row.get("tests", "")
    if not isinstance(tests, str) and not (isinstance(tests, list) and all(isinstance(one, str) for one in tests)):
        raise DataError(f"prompt {number} of {path} has tests that are neither text nor a list of texts: write Python")
    if not isinstance(row.get("response", ""), str):
        raise DataError(f"prompt {number} of {path} has a response that is no text: write it as text, or leave it out")
