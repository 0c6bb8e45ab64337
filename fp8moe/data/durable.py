"""Files that are whole or absent after a crash: written under another name, flushed to disk, renamed.

fsync of a file does not store its name, which belongs to its folder: the folder is flushed as well, after the rename,
and so is the folder above one that was made. An error of the disk becomes one sentence here: SpaceError where it is
full, or a quota is used up, else DataError.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fp8moe.errors import DataError, SpaceError

MOST_NAME = 200  # bytes of a file's name that its hidden name has; file systems take 255
FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)  # a file system that can't flush a folder


def sync(path: Path) -> None:
    """Return when a file's bytes, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def scratch_name(final: Path) -> Path:
    """The hidden name beside `final` under which this process writes it; no longer than a file's may be."""
    return final.with_name(f".{os.fsdecode(os.fsencode(final.name)[:MOST_NAME])}.{os.getpid()}")


def publish(written: Path, final: Path) -> None:
    """Give a written file its name; both are on disk afterwards."""
    sync(written)
    written.replace(final)
    sync(final.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file so that no reader, and no crash, sees half of it. Raises OSError; an old file stays then."""
    with _scratch(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
        publish(scratch, path)


def copy_file(source: Path, path: Path) -> None:
    """Copy a file so that no reader, and no crash, sees half of it. Raises OSError."""
    with _scratch(path) as scratch:
        shutil.copyfile(source, scratch)
        publish(scratch, path)


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """The hidden name under which a file is written; removed at the end. An OSError names `path` in its place."""
    scratch = scratch_name(path)
    try:
        yield scratch
    except OSError as error:
        if error.filename == str(scratch):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):  # which would hide the cause
            scratch.unlink(missing_ok=True)


def make_folder(path: Path) -> list[Path]:
    """Make a folder and those above it that don't exist, their names on disk -> those that were made, inmost first."""
    made = []
    for folder in (path, *path.parents):
        if folder.exists():
            break
        made.append(folder)
    path.mkdir(parents=True, exist_ok=True)
    for folder in made:
        sync(folder.parent)
    return made


def is_file(path: Path) -> bool:
    """Whether there is a file of this name. Raises DataError where that can't be seen."""
    try:
        return path.is_file()
    except OSError as error:
        raise unreadable(path, error) from error


def unwritable(path: object, error: OSError, advice: str) -> DataError | SpaceError:
    """The error to raise where something below `path` can't be written: the cause, and `advice`."""
    kind = SpaceError if error.errno in FULL else DataError
    return kind(f"{path} can't be written ({error.strerror or error}): {advice}")


def unreadable(path: object, error: OSError) -> DataError:
    """The error to raise where `path` can't be read."""
    return DataError(f"{path} can't be read ({error.strerror or error}): check the path and the access to it")
