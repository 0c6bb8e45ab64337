"""The file operations of checkpoints, on this machine's file systems or behind any URL that fsspec knows.

    local     a file is on disk (fsync) when it is closed; a checkpoint is written under another name and renamed
    by URL    `remote.RemoteFolder`: a checkpoint is written in its place, where it counts from its last file on, the
              manifest

Refused: fsspec for local files as well, which synchronizes nothing; reading through a memory map, where a file that is
cut off meanwhile kills the process without a sentence, for 12 instead of 9 GB/s out of the page cache.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fp8moe.data.durable import make_folder, sync
from fp8moe.train.checkpoint.hashed_file import HashedFile, WrittenFile
from fp8moe.train.checkpoint.location import Location, Url
from fp8moe.train.checkpoint.remote import RemoteFolder


def reason(error: Exception) -> str:
    """Why a file of a checkpoint can't be used, in words."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return "it is not JSON"
    return f"the key {error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__


class LocalFolder:
    """A folder on a file system of this machine. All methods raise OSError."""

    chunk = 1 << 20  # bytes read or written at once: what a core's cache holds

    def __init__(self, path: Path) -> None:
        self.where: Location = path
        self._path = path

    def names(self) -> list[str]:
        """What is in it; [] where it does not exist."""
        return [entry.name for entry in self._path.iterdir()] if self._path.is_dir() else []

    def has(self, name: str) -> bool:
        """Whether it holds a file of this name."""
        return (self._path / name).is_file()

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return (self._path / name).stat().st_size

    def open(self, name: str) -> BinaryIO:
        """A file to read from."""
        return open(self._path / name, "rb")

    def create(self, name: str) -> HashedFile:
        """A file to write."""
        return HashedFile(open(self._path / name, "wb"), sync=True, chunk=self.chunk)

    def replace(self, name: str, content: bytes) -> None:
        """Give a file this content; a reader finds the old or the new one, whole."""
        write_bytes(self, f"{name}.tmp", content)
        (self._path / f"{name}.tmp").replace(self._path / name)
        self.sync()

    def remove(self, name: str) -> None:
        """Delete a file."""
        (self._path / name).unlink()

    def make(self) -> None:
        """Make it, unless it exists."""
        make_folder(self._path)

    def remove_itself(self) -> None:
        """Delete it; it is empty."""
        self._path.rmdir()

    def written_as(self) -> LocalFolder:
        """Where its files are written until `publish`."""
        return LocalFolder(self._path.with_name(f"{self._path.name}.tmp"))

    def publish(self, written: LocalFolder) -> None:
        """Give `written`, all of whose files are on disk, this name; one that has it already is deleted."""
        written.sync()
        if self._path.exists():  # a run that was resumed from before this step saves it again
            shutil.rmtree(self._path)
        written._path.rename(self._path)
        LocalFolder(self._path.parent).sync()

    def free(self) -> float:
        """Bytes that may still be written."""
        path = self._path.absolute()
        return shutil.disk_usage(next(one for one in (path, *path.parents) if one.is_dir())).free

    def sync(self) -> None:
        """Wait until the names in it are on disk; its files were synchronized when they were closed."""
        sync(self._path)


Folder = LocalFolder | RemoteFolder


def folder_of(where: Location) -> Folder:
    """The operations on the folder at `where`."""
    return RemoteFolder(where) if isinstance(where, Url) else LocalFolder(where)


def write_bytes(folder: Folder, name: str, content: bytes) -> WrittenFile:
    """A file of `content`, hashed and stored."""
    with space_in_words(folder, name, len(content)):
        return folder.create(name).fill(content)


@contextlib.contextmanager
def space_in_words(folder: Folder, name: str, num_bytes: int) -> Iterator[None]:
    """An OSError of the block says which file was written, the bytes that it needs and those free."""
    try:
        yield
    except OSError as error:
        need, free = num_bytes / 1e9, folder.free() / 1e9
        reason = f"{error.strerror or error}; {name} needs {need:.3g} GB and {free:.3g} GB are free"
        raise OSError(error.errno, reason) from error


def read_text(folder: Folder, name: str) -> str:
    """A file's text."""
    with folder.open(name) as file:
        return file.read().decode()


def clear(folder: Folder, first: str) -> None:
    """Make the folder exist and be empty; the file `first` goes first, so that nobody takes it for whole."""
    names = folder.names()
    for name in sorted(names, key=lambda name: name != first):
        folder.remove(name)
    folder.make()


def delete(folder: Folder, last: str) -> None:
    """Delete the folder, the file `last` after the others: what an interruption leaves is found and deleted later."""
    for name in sorted(folder.names(), key=lambda name: name == last):
        folder.remove(name)
    folder.remove_itself()


def writing_problem(where: Location) -> str | None:
    """Why no file can be written at `where`; None where one can be. Leaves nothing there."""
    folder = folder_of(where)
    try:
        folder.make()
        folder.create(".writable").fill(b"\n")
        folder.remove(".writable")
        if not folder.names():
            folder.remove_itself()
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.remove(".writable")
        return error.strerror or str(error)
    return None
