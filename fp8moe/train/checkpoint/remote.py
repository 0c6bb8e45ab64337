"""A folder behind a URL: the operations of `files.LocalFolder` by fsspec.

An object is there when it is closed, and there is no rename: a checkpoint is written in its place. Tested with
memory://; what s3://, gs:// and others need (s3fs, gcsfs) is theirs to install, and has not been tried.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, BinaryIO, ParamSpec, TypeVar

import fsspec

from fp8moe.errors import ConfigError
from fp8moe.train.checkpoint.hashed_file import HashedFile
from fp8moe.train.checkpoint.location import Location, Url

P = ParamSpec("P")
R = TypeVar("R")


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Libraries of object stores have errors of their own."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _remote(method: Callable[P, R]) -> Callable[P, R]:
    @wraps(method)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        with _as_os_error():
            return method(*args, **kwargs)

    return guarded


class _RemoteFile:
    """A file of fsspec that raises OSError and nothing else."""

    def __init__(self, handle: Any) -> None:
        self.read, self.readinto, self.seek = _remote(handle.read), _remote(handle.readinto), _remote(handle.seek)
        self.write, self.close = _remote(handle.write), _remote(handle.close)

    def __enter__(self) -> _RemoteFile:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


class RemoteFolder:
    """A folder behind a URL, with the methods of `LocalFolder`. Raises ConfigError where fsspec can't open the URL, and
    OSError, whatever the store's library raises, afterwards."""

    chunk = 1 << 24  # a request each, for which an object store takes some 50 ms

    def __init__(self, url: Url) -> None:
        self.where: Location = url
        try:
            self._fs, self._path = fsspec.core.url_to_fs(url.text)
        except Exception as error:
            raise ConfigError(f"{url} can't be opened ({error}): use a path or a URL that fsspec knows") from error

    def _at(self, name: str) -> str:
        return f"{self._path.rstrip('/')}/{name}"

    @_remote
    def names(self) -> list[str]:
        self._fs.invalidate_cache()  # other processes write as well
        try:
            return [str(path).rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._path, detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    @_remote
    def has(self, name: str) -> bool:
        self._fs.invalidate_cache()
        return bool(self._fs.isfile(self._at(name)))

    @_remote
    def size(self, name: str) -> int:
        return int(self._fs.size(self._at(name)))

    @_remote
    def open(self, name: str) -> BinaryIO:
        handle: Any = _RemoteFile(self._fs.open(self._at(name), "rb", cache_type="none"))
        return handle

    @_remote
    def create(self, name: str) -> HashedFile:
        return HashedFile(_RemoteFile(self._fs.open(self._at(name), "wb")), sync=False, chunk=self.chunk)

    @_remote
    def replace(self, name: str, content: bytes) -> None:
        self.create(name).fill(content)

    @_remote
    def remove(self, name: str) -> None:
        self._fs.rm_file(self._at(name))

    @_remote
    def make(self) -> None:
        self._fs.makedirs(self._path, exist_ok=True)

    @_remote
    def remove_itself(self) -> None:
        with contextlib.suppress(OSError):  # a store without folders
            self._fs.rmdir(self._path)

    def written_as(self) -> RemoteFolder:
        return self

    def publish(self, written: RemoteFolder) -> None:
        """Nothing: the manifest is there."""

    def free(self) -> float:
        """Without bound, as far as can be known."""
        return math.inf
