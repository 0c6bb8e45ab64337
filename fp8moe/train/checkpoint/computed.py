"""A checkpoint whose values are computed as they are written, by one process: what an import makes.

Each tensor is given in parts, ranges of its flattened values (`pieces`), one of which is in memory at a time. Files are
of at most 50 GB. It is the format of `folder`, whole or absent like those.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fp8moe.train.checkpoint.files import clear, delete, folder_of, write_bytes
from fp8moe.train.checkpoint.folder import LATEST
from fp8moe.train.checkpoint.location import Location
from fp8moe.train.checkpoint.manifest import MANIFEST_FILE, write_manifest
from fp8moe.train.checkpoint.state import STATE_FILE
from fp8moe.train.checkpoint.storage import INDEX_FILE, Part, dtype_name, write_safetensors

MOST_BYTES = 50_000_000_000


def write_computed(root: Location, step: int, state: str, tensors: Mapping[str, Sequence[Part]]) -> Location:
    """Write `root/step-N` of `tensors`, the parts of each end to end. Raises OSError; nothing stays then."""
    final = folder_of(root / f"step-{step}")
    written = final.written_as()
    try:
        clear(written, first=MANIFEST_FILE)
        placed = _placed(tensors)
        files = {}
        for number, parts in enumerate(placed):
            files[_file(number)] = write_safetensors(written, _file(number), parts)
        where = {part.name: _file(number) for number, parts in enumerate(placed) for part in parts}
        index = {name: _entry(parts, where) for name, parts in tensors.items()}
        files[INDEX_FILE] = write_bytes(written, INDEX_FILE, json.dumps({"tensors": index}).encode())
        files[STATE_FILE] = write_bytes(written, STATE_FILE, state.encode())
        write_manifest(written, files)
        final.publish(written)  # type: ignore[arg-type]
        folder_of(root).replace(LATEST, f"{final.where.name}\n".encode())
    except OSError:
        if not written.has(MANIFEST_FILE):
            delete(written, last=MANIFEST_FILE)
        raise
    return final.where


def _file(number: int) -> str:
    return f"rank-{number}.safetensors"


def _placed(tensors: Mapping[str, Sequence[Part]]) -> list[list[Part]]:
    """The parts of each file."""
    files: list[list[Part]] = [[]]
    size = 0
    for part in (part for parts in tensors.values() for part in parts):
        if size + part.num_bytes > MOST_BYTES and files[-1]:
            files.append([])
            size = 0
        files[-1].append(part)
        size += part.num_bytes
    return files


def _entry(parts: Sequence[Part], where: Mapping[str, str]) -> dict[str, Any]:
    stored, offset = [], 0
    for part in parts:
        (length,) = part.shape
        stored.append({"offsets": [offset], "sizes": [length], "file": where[part.name], "name": part.name})
        offset += length
    return {"dtype": dtype_name(parts[0].dtype), "shape": [offset], "parts": stored}
