"""Folders that are built once and then only read, safe among processes and jobs that want the same one at once.

A folder is built under a temporary name beside its place and moved there by one rename, so it exists whole or not at
all. A file lock keeps others from doing the same work meanwhile; where the file system has no locks they do it twice
and the first rename wins, which is as correct. Everything built here is a pure function of its name's key, hence
nothing is ever invalidated: another input is another name.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from fp8moe.errors import DataError


def cache_root(cache_dir: str | None) -> Path:
    """The cache folder: `cache_dir`, or the user's cache folder when None (not created here)."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fp8moe"


def key_of(*parts: object) -> str:
    """20 hex digits that name these JSON-able parts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def sync(path: Path) -> None:
    """Wait until a file is on disk: a rename must not outrun the bytes it publishes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a") as handle:
        with contextlib.suppress(OSError):  # no locks on this file system: the rename alone must do
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def built_folder(root: Path, name: str, build: Callable[[Path], None]) -> Path:
    """`root/name`, made by `build(empty folder)` unless it is there already. Raises DataError when it can't be made."""
    final = root / name
    if final.is_dir():
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{name}.lock"):
            if final.is_dir():
                return final
            scratch = root / f".{name}.{uuid.uuid4().hex}"
            scratch.mkdir()
            try:
                build(scratch)
                for path in scratch.iterdir():
                    sync(path)
                _publish(scratch, final)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"the data cache {root} can't be written ({error.strerror or error}): "
            "free some space or set data.cache_dir to another folder"
        ) from error
    return final


def _publish(scratch: Path, final: Path) -> None:
    try:
        scratch.rename(final)
    except OSError:
        if not final.is_dir():  # else another process was first, with the same content
            raise
