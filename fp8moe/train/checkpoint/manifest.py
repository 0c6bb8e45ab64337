"""manifest.json: size and hash of every other file of a checkpoint; written last, so its presence means complete.

A checkpoint is verified against it before any tensor is set: a flipped byte, a file that was cut off or is missing is
named. Several ranks share the work, file by file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import xxhash

from fp8moe.train.checkpoint.files import Folder, folder_of, read_text, write_bytes
from fp8moe.train.checkpoint.hashed_file import WrittenFile
from fp8moe.train.checkpoint.location import Location

MANIFEST_FILE = "manifest.json"


def write_manifest(folder: Folder, files: Mapping[str, WrittenFile]) -> None:
    """Write the manifest of `files`, which are stored."""
    content = {"files": {name: asdict(files[name]) for name in sorted(files)}}
    write_bytes(folder, MANIFEST_FILE, json.dumps(content, indent=1).encode() + b"\n")


def read_manifest(where: Location) -> dict[str, WrittenFile]:
    """The files that belong to the checkpoint. Raises ValueError, in words, where the manifest is damaged."""
    try:
        content = json.loads(read_text(folder_of(where), MANIFEST_FILE))
        files = {
            str(name): WrittenFile(int(file["size"]), str(file["xxh3"])) for name, file in content["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST_FILE} can't be read ({type(error).__name__})") from error
    if any(Path(name).name != name for name in files):
        raise ValueError(f"{MANIFEST_FILE} names a file outside its folder")
    return files


def problems(where: Location, share: int = 0, shares: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint, one sentence a file; this share of them alone, of `shares`."""
    try:
        files = read_manifest(where)
    except ValueError as damaged:
        return [str(damaged)]
    folder = folder_of(where)
    found = [_problem(folder, name, files[name]) for name in sorted(files)[share::shares]]
    return [problem for problem in found if problem is not None]


def _problem(folder: Folder, name: str, expected: WrittenFile) -> str | None:
    try:
        size = folder.size(name)
        if size != expected.size:
            return f"{name} has {size} bytes and was written with {expected.size}"
        digest = xxhash.xxh3_128()
        with folder.open(name) as file:
            while chunk := file.read(folder.chunk):
                digest.update(chunk)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} can't be read ({error.strerror or error})"
    if digest.hexdigest() != expected.xxh3:
        return f"{name} has other bytes than were written (XXH3 {digest.hexdigest()[:8]}, not {expected.xxh3[:8]})"
    return None
