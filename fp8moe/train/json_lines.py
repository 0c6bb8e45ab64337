"""Files of one JSON record a line, which a run appends to: metrics, events, expert loads, figures of the ranks.

A line is written at once and the file closed, so that a run that dies has written all it had to say; its last line may
be half a line, which readers pass over. A number that is not finite is written as null: JSON has no such number, and
most readers refuse Python's NaN.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fp8moe.data.durable import write_text

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
EXPERT_LOAD = "expert_load.jsonl"
RANKS = "ranks.jsonl"
SAMPLES = "samples.json"  # {"samples": [{"prompt", "text"}]}, of the run's end

_logger = logging.getLogger(__name__)


def finite(value: Any) -> Any:
    """`value` with every float that is not finite, which JSON cannot hold, replaced by None."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The records of a file, and the numbers (from 1) of lines that are none; nothing of a file that is not there.

    Raises OSError where it can't be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return [], []
    records, broken = [], []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif line.strip():
            broken.append(number)
    return records, broken


class JsonLines:
    """Appends records to a file. A full disk ends no run: what has no room waits for the next record."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unwritten = ""

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record as a line; what a full disk means the checkpoints decide."""
        text = self._unwritten + json.dumps(finite(record), allow_nan=False, separators=(", ", ": ")) + "\n"
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(text)
            self._unwritten = ""
        except OSError as error:
            if not self._unwritten:
                _logger.warning("%s can't be written (%s)", self._path, error.strerror)
            self._unwritten = text
            with contextlib.suppress(OSError):  # half of it may be there
                os.truncate(self._path, size)

    def keep_until(self, step: int, keep: Callable[[dict[str, Any]], bool] = lambda _: False) -> None:
        """Remove the records of later steps, which are done again, but those to `keep`; and broken lines."""
        if not self._path.exists():
            return
        kept = [record for record in read_lines(self._path)[0] if _is_until(record, step) or keep(record)]
        write_text(self._path, "".join(f"{json.dumps(record)}\n" for record in kept))


def _is_until(record: Mapping[str, Any], step: int) -> bool:
    return isinstance(record.get("step"), int) and record["step"] <= step
