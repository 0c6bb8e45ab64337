"""Cache of prepared data: folders that are built once and then only read, by many processes and jobs at once.

A folder is built under a temporary name and then renamed, so it exists whole or not at all. A file lock keeps other
processes from doing the same work; on a file system without locks two may do it, and the first rename wins, with the
same content. The content of a folder depends on its name alone, which holds a hash of all inputs: other inputs have
another name, and no folder is ever out of date.
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

from fp8moe.data.durable import FULL, make_folder, sync, unwritable
from fp8moe.errors import DataError, SpaceError


def cache_root(cache_dir: str | None) -> Path:
    """The cache folder: `cache_dir`, or the user's cache folder when None (not created here)."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fp8moe"


def key_of(*parts: object) -> str:
    """The first 20 hex digits of the SHA-256 of `parts` as JSON."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a") as handle:
        with contextlib.suppress(OSError):  # a file system without locks: see the top of this module
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def built_folder(root: Path, name: str, build: Callable[[Path], None]) -> Path:
    """The folder `root/name`, made by `build(empty folder)` if it does not exist.

    Raises DataError where the cache can't be read or written, SpaceError where its disk is full.
    """
    final = root / name
    try:
        if final.is_dir():
            return final
        make_folder(root)
        with _locked(root / f".{name}.lock"):
            if final.is_dir():
                return final
            scratch = root / f".{name}.{uuid.uuid4().hex}"
            scratch.mkdir()
            try:
                build(scratch)
                for path in (*scratch.iterdir(), scratch):
                    sync(path)
                _publish(scratch, final)
                sync(root)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise _unwritable(root, error) from error
    return final


def read_number(path: Path) -> float:
    """The number in a JSON file of the cache. Raises DataError."""
    try:
        return float(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"the cached {path} can't be read ({error}): delete {path.parent}") from error


def _unwritable(root: Path, error: OSError) -> DataError | SpaceError:
    advice = "free some space or set data.cache_dir to another folder"
    if error.errno in FULL:
        advice = f"{shutil.disk_usage(root).free / 1e9:.2f} GB are free: {advice}"
    return unwritable(f"the data cache {root}", error, advice)


def _publish(scratch: Path, final: Path) -> None:
    try:
        scratch.rename(final)
    except OSError:
        if not final.is_dir():  # another process may have renamed its own first
            raise
