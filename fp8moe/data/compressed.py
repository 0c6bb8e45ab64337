"""Opens text files, those compressed by gzip or Zstandard as well, as a stream.

A file that is cut off must be an error: gzip's reader says so, the zstandard package's stream reader ends in silence,
so frames are taken one by one here. Files of many frames, as parallel compressors write them, are read whole.
"""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from fp8moe.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

COMPRESSED_ENDINGS = (".gz", ".zst")
_CHUNK = 1 << 20


def open_text(path: Path, newline: str) -> TextIO:
    """A file as UTF-8 text, decompressed by the ending of its name; newline: as of `open`.

    Opening and reading raise OSError; UnicodeDecodeError; EOFError and zlib.error where compressed bytes are cut off or
    damaged; DataError where the zstandard package is missing.
    """
    ending = path.suffix.lower()
    if ending not in COMPRESSED_ENDINGS:
        return open(path, encoding="utf-8", newline=newline)
    raw = gzip.GzipFile(path, "rb") if ending == ".gz" else io.BufferedReader(_Frames(path), _CHUNK)
    return io.TextIOWrapper(cast(io.BufferedReader, raw), encoding="utf-8", newline=newline)


class _Frames(io.RawIOBase):
    """The bytes of all Zstandard frames of a file."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise DataError(
                f"{path} needs the zstandard package: pip install 'fp8moe[data]', or decompress it"
            ) from error
        self._error = zstandard.ZstdError
        self._frames = zstandard.ZstdDecompressor()
        self._file = open(path, "rb")  # noqa: SIM115  closed by `close`
        self._frame: Any = None
        self._compressed, self._ready = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fills the buffer as far as there are bytes; 0 at the end. Raises EOFError."""
        view = memoryview(buffer).cast("B")
        while not self._ready and self._more():
            pass
        count = min(len(view), len(self._ready))
        view[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _more(self) -> bool:
        """Decompresses the next chunk; whether there was one."""
        self._compressed = self._compressed or self._file.read(_CHUNK)
        if not self._compressed:
            if self._frame is not None:
                raise EOFError("it ends within a Zstandard frame")
            return False
        self._frame = self._frame or self._frames.decompressobj()
        try:
            self._ready = self._frame.decompress(self._compressed)
        except self._error as error:
            raise EOFError(str(error)) from error
        self._compressed = self._frame.unused_data if self._frame.eof else b""
        self._frame = None if self._frame.eof else self._frame
        return True

    def close(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
        super().close()
