"""Where checkpoints lie: a Path on this machine's file systems, or a Url behind fsspec; file:// is a Path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Url:
    """Where a file or folder lies, for fsspec; the part of pathlib.Path that is needed of it."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.text}/{name}")

    @property
    def name(self) -> str:
        return self.text.rpartition("/")[2]

    @property
    def parent(self) -> Url:
        return Url(self.text.rpartition("/")[0])

    def resolve(self) -> Url:
        """Itself: a URL is absolute."""
        return self


Location = Path | Url


def location(text: str | Path | Url) -> Location:
    """The path or URL that `text` means."""
    if not isinstance(text, str):
        return text
    if text.startswith("file://"):
        return Path("/" + text.removeprefix("file://").lstrip("/"))
    return Url(text.rstrip("/")) if "://" in text else Path(text)
