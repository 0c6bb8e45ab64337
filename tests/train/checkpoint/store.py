"""An object store for tests, store://PATH: no rename, no fsync, errors of its own, files of this machine beneath.

Unlike memory:// it is seen by several processes.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor


class StoreError(Exception):
    """No OSError, as the errors of stores' libraries."""


class Store(LocalFileSystem):
    """LocalFileSystem under another protocol."""

    protocol = "store"

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(super()._strip_protocol(str(path).removeprefix("store:/")))

    def mv(self, *args: Any, **kwargs: Any) -> None:
        raise StoreError("there is no rename")

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> Any:
        if "forbidden" in path:
            raise StoreError("403 Forbidden")
        return super().ls(path, detail=detail, **kwargs)

    def rmdir(self, path: str) -> None:
        super().rmdir(path)
        raise FileExistsError(path)  # as s3fs says of what is no bucket

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "forbidden" in path:
            raise StoreError("403 Forbidden")
        return Upload(self._strip_protocol(path)) if mode == "wb" else super().open(path, mode, **kwargs)


class Upload(io.BytesIO):
    """An object that is there, whole, when it is closed, and not before."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = Path(path)

    def close(self) -> None:
        if not self.closed:
            self._path.write_bytes(self.getvalue())
        super().close()

    def __del__(self) -> None:
        """Not closed: nothing is there."""


fsspec.register_implementation("store", Store, clobber=True)


def full_of(value: float, count: int = 4) -> dict[str, Tensor]:
    """A state of one tensor."""
    return {"master": torch.full((count,), value)}


def url_of(path: Path) -> str:
    """The URL of a path in the store."""
    return f"store:/{path}"
