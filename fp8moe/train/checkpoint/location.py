"""Where checkpoints lie: a Path on this machine's file systems, or a Url behind fsspec; file:// is a Path."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fp8moe.errors import ConfigError

_PASSWORD = re.compile(r"://[^/@:]*:(?!\d+(?:/|$))[^@]*@")  # after a colon; digits up to a slash are a port


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
    if not text:  # of a variable of the shell that is not set; Path("") would be the folder one is in
        raise ConfigError("the path of a run or checkpoint is empty: name a run directory or its checkpoints/step-N")
    if text.startswith("file://"):
        return Path("/" + text.removeprefix("file://").lstrip("/"))
    return Url(text.rstrip("/")) if "://" in text else Path(text)


def refuse_password(key: str, text: str | None) -> None:
    """Raise ConfigError where a setting is a URL with a password: settings are written to config.yaml and logs."""
    if text is not None and _PASSWORD.search(text):
        raise ConfigError(
            f"{key}={_PASSWORD.sub('://', text):.60} was given with a password, and settings are written to files: "
            "leave it out, and give it to the store's library by its environment variables or fsspec's configuration"
        )
