"""The embedded corpus: the sources and docstrings of the Python standard library that is running this program.

Real text and code, on every machine, with nothing to download. A document is a file. What is left out, and why:
- `site-packages`, `dist-packages`, symbolic links: not the standard library but what a machine added to it;
- `test`, `tests`, `idle_test`: slim container images and Linux distributions delete exactly these, so that keeping them
  would make the corpus depend on the packaging (they are also over half of the bytes: tables, fixtures, odd encodings);
- `encodings`: nearly all of it is generated character tables, a tenth of the bytes and trivially predictable;
- `config-*` and `_sysconfigdata*`: generated at build time, full of the building machine's paths.
That leaves about 10 MB in 600 files. The order is that of the sorted relative paths, never that of the file system.

The held-out part is chosen by file: files are taken in the order of the SHA-256 of their relative path until they make
up the wanted share of the BYTES; a plain threshold on the hash would leave the share of so few files to luck. A file
larger than a quarter of that share is passed over, or one giant (0.7 MB of help topics) would BE the validation set.
"""

from __future__ import annotations

import hashlib
import io
import os
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path

from fp8moe.errors import DataError

SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
)
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


@dataclass(frozen=True)
class Document:
    """One file: its path relative to the corpus, with forward slashes, and its text."""

    name: str
    text: str


def standard_library_root() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def list_sources(root: Path) -> list[str]:
    """Relative paths of the `.py` files of the corpus under `root`, sorted."""
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if _is_kept(name)]
        for file in files:
            path = Path(folder, file)
            if file.endswith(".py") and _is_kept(file) and not path.is_symlink():
                names.append(path.relative_to(root).as_posix())
    return sorted(names)


def _is_kept(name: str) -> bool:
    return name not in SKIPPED_FOLDERS and not name.startswith(SKIPPED_PREFIXES)


def read_source(path: Path) -> str | None:
    """The text of a Python file in the encoding it declares; None when it breaks its own declaration."""
    raw = path.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return raw.decode(encoding)
    except (SyntaxError, UnicodeDecodeError):
        return None


def read_corpus(root: Path) -> list[Document]:
    """All readable, non-empty files under `root` in sorted order. Raises DataError when fewer than two are left."""
    documents = []
    for name in list_sources(root):
        text = read_source(root / name)
        if text:
            documents.append(Document(name, text))
    if len(documents) < 2:
        raise DataError(
            f"the embedded corpus needs at least 2 Python source files under {root}, found {len(documents)} "
            "(an interpreter without its sources?): use another Python or data.source=indexed"
        )
    return documents


def split_by_file(documents: list[Document], validation_share: float) -> tuple[list[Document], list[Document]]:
    """(train, validation), each in the order of `documents`; a pure function of names and sizes, never empty."""
    sizes = {document.name: len(document.text.encode()) for document in documents}
    wanted = validation_share * sum(sizes.values())
    by_hash = sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest())
    small = [name for name in by_hash if sizes[name] <= wanted / 4] or [min(by_hash, key=lambda name: sizes[name])]
    held_out: set[str] = set()
    taken = 0
    for name in small:
        if held_out and (taken >= wanted or len(held_out) == len(documents) - 1):
            break
        held_out.add(name)
        taken += sizes[name]
    train = [document for document in documents if document.name not in held_out]
    validation = [document for document in documents if document.name in held_out]
    return train, validation


def content_key(documents: list[Document]) -> str:
    """A hash over all names and texts."""
    digest = hashlib.sha256()
    for document in documents:
        text = document.text.encode()
        digest.update(f"{document.name}\0{len(text)}\0".encode())
        digest.update(text)
    return digest.hexdigest()
