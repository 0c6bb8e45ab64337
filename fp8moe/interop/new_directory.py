"""A directory that is whole or absent: written beside its place, then renamed; nothing is overwritten."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fp8moe.data.durable import scratch_name, unwritable
from fp8moe.errors import ConfigError, SpaceError


def check_empty(out: Path) -> None:
    """Raise ConfigError unless a directory can be made at `out`: nothing is overwritten."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty directory: name a new one, nothing is overwritten")


@contextmanager
def new_directory(out: Path, need: int, what: str) -> Iterator[Path]:
    """The directory to write in, which is `out` when the block ends without an error, and gone with one.

    need: bytes that `what` takes. Raises ConfigError, DataError and SpaceError.
    """
    check_empty(out)
    scratch = scratch_name(out)
    try:
        scratch.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(scratch.parent).free) < need:
            raise SpaceError(
                f"{out.parent} has {free / 1e9:.3g} GB free and {what} {need / 1e9:.3g} GB: free space or name another "
                "directory"
            )
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        yield scratch
        if out.exists():
            out.rmdir()
        scratch.rename(out)
    except OSError as error:
        raise unwritable(out, error, "free space or name another directory") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
