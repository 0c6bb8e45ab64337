"""The file of all samples, accepted or not: a JSON line each, on disk before the next is taken.

It is what a killed command goes on from: (prompt, form, sample) that stand in it are not asked for again. Its first
line says which teacher and settings made it, and others may not add to it. A line that a kill cut is removed. Where one
sample has several lines, after verifiers changed, the last counts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fp8moe.data.durable import make_folder, sync, unreadable, unwritable
from fp8moe.errors import ConfigError
from fp8moe.limits import shown
from fp8moe.train.json_lines import finite, read_lines

Key = tuple[str, str, int]
ADVICE = "free space or name another --output; the same command goes on"


def samples_path(output: Path) -> Path:
    """Where the samples of OUT.jsonl lie: OUT.samples.jsonl."""
    return output.with_name(f"{output.name.removesuffix('.jsonl')}.samples.jsonl")


def stored_samples(path: Path, settings: Mapping[str, Any]) -> dict[Key, dict[str, Any]]:
    """The samples of a file by (prompt, form, sample). Raises ConfigError if other settings made it."""
    try:
        records = read_lines(path)[0]
    except OSError as error:
        raise unreadable(path, error) from error
    if not records:
        return {}
    made = records[0].get("settings")
    if not isinstance(made, dict):
        raise ConfigError(f"{path} is no file of samples: name another --output")
    here = json.loads(json.dumps(finite(settings)))
    for key in [*made, *(key for key in here if key not in made)]:
        if made.get(key) != here.get(key):
            raise ConfigError(
                f"{path} holds samples of {key}={shown(made.get(key))} and this command asks for "
                f"{shown(here.get(key))}: name another --output, or remove that file"
            )
    samples = {}
    for one in records[1:]:
        if isinstance(one.get("prompt_id"), str) and isinstance(one.get("sample"), int) and "text" in one:
            samples[(one["prompt_id"], str(one.get("form")), one["sample"])] = one
    return samples


class SampleWriter:
    """Appends samples to the file, made where it is missing; it is locked as long as `open` lasts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    @contextlib.contextmanager
    def open(self, settings: Mapping[str, Any]) -> Iterator[SampleWriter]:
        """Raises ConfigError if another command writes the file, DataError or SpaceError if it can't be written."""
        try:
            make_folder(self._path.absolute().parent)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise unwritable(self._path, error, ADVICE) from error
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                try:
                    fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ConfigError(
                        f"another fp8moe distill writes {self._path}: wait for it, or use another --output"
                    ) from None
            self._remove_cut_line()
            if os.fstat(self._descriptor).st_size == 0:
                self.append({"settings": settings})
                sync(self._path.absolute().parent)
            yield self
        finally:
            os.close(self._descriptor)

    def append(self, record: Mapping[str, Any]) -> None:
        """Return when the record is on disk. Raises DataError or SpaceError; nothing of it is left then."""
        line = json.dumps(finite(record), allow_nan=False).encode() + b"\n"
        size = os.fstat(self._descriptor).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
            os.fsync(self._descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, size)
            raise unwritable(self._path, error, ADVICE) from error

    def _remove_cut_line(self) -> None:
        """End the file behind its last whole line."""
        size = end = os.fstat(self._descriptor).st_size
        while end:
            start = max(0, end - (1 << 16))
            at = os.pread(self._descriptor, end - start, start).rfind(b"\n")
            if at >= 0:
                end = start + at + 1
                break
            end = start
        if end < size:
            os.ftruncate(self._descriptor, end)
