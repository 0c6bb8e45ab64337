"""Sources of text: the data settings and the embedded corpus.

**The embedded corpus** is the source code and docstrings of the Python standard library that runs this program: real
text on every machine, nothing to download. A document is a file. Left out, and why:
- `site-packages`, `dist-packages`, symbolic links: these belong to the machine, not to the standard library;
- `test`, `tests`, `idle_test`: container images and Linux distributions delete exactly these, so with them the corpus
  would depend on the packaging (they are also over half of the bytes: tables, fixtures, odd encodings);
- `encodings`: nearly all of it is generated character tables, a tenth of the bytes and trivially predictable;
- `config-*` and `_sysconfigdata*`: generated at build time, full of the building machine's paths.
About 10 MB in 600 files are left. They are ordered by relative path, never in the order of the file system.

The corpus holds out validation text by file: files are taken in the order of the SHA-256 of their relative path until
they make up the wanted share of the BYTES. A threshold on the hash was refused: with so few files it misses the share
by chance. A file larger than a quarter of the wanted bytes is skipped, or the largest (0.7 MB of help topics) would be
most of the validation set.
"""

from __future__ import annotations

import hashlib
import io
import os
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fp8moe.data.durable import unreadable
from fp8moe.errors import ConfigError, DataError
from fp8moe.limits import Range, check_fields

SOURCES = ("stdlib", "indexed", "chat", "problems")
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
)
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


@dataclass(frozen=True)
class DataConfig:
    """Settings of the training and validation data, checked on construction (raises ValueError)."""

    # stdlib: this Python's standard library, tokenized on the first run and cached; indexed: token files; chat:
    # conversations, of which the assistant's part is learned, tokenized and cached likewise; problems: of `fp8moe grpo`
    source: str = "stdlib"
    # prefixes of token files, without .bin and .idx (indexed); files of conversations, .jsonl or .parquet (chat);
    # .jsonl with prompt and answer on every line (problems; empty: a task's)
    paths: tuple[str, ...] = ()
    # a number >= 0 a path, any sum: shares of samples, not of epochs, so a small file of a large weight
    # repeats; empty: equal
    weights: tuple[float, ...] = ()
    # validation data, as paths, mixed by their sizes; empty: validation_share counts
    validation_paths: tuple[str, ...] = ()
    # share held out of the training data: by file (stdlib); by document, or the end of a single one (indexed)
    validation_share: float = 0.025
    # a tokenizer.json, byte-level or as Llama 2's; None: trained on the corpus (stdlib) or PREFIX.tokenizer.json
    # (indexed; where there is none, there are no bits per byte); for chat, that of init_from (fp8moe sft)
    tokenizer: str | None = None
    # chat: chatml, plain, or a Jinja file; None: chat_template.jinja or tokenizer_config.json beside the tokenizer
    chat_template: str | None = None
    # chat: a conversation longer than a sample loses its end, or is left out
    long_conversations: Literal["truncate", "drop"] = "truncate"
    vocab_size: int = 4096  # token ids are below it; configs/: the model's; also of a tokenizer trained here
    document_mask: bool = False  # attention stays within a document, and the first token of a document is not predicted
    # stream: documents joined and cut anywhere; documents: whole documents fill samples by best fit, with padding
    packing: Literal["stream", "documents"] = "stream"
    fim_rate: float = 0.0  # share of the training documents in the order prefix, suffix, middle (fill-in-the-middle)
    # names of its three tokens: begin, hole, end; empty: DeepSeek's, <｜fim▁begin｜> and so on, or else <|fim_prefix|>,
    # <|fim_suffix|>, <|fim_middle|>, those that the tokenizer has
    fim_tokens: tuple[str, ...] = ()
    cache_dir: str | None = None  # folder for prepared data; None: $XDG_CACHE_HOME/fp8moe, or ~/.cache/fp8moe
    prefetch: int = 2  # steps whose batches a thread reads ahead of training; 0: training reads them itself

    def __post_init__(self) -> None:
        check_fields(
            self,
            "data",
            weights=Range(least=0, use="use a finite number >= 0"),
            validation_share=Range(above=0, most=0.5, use="the default is 0.025"),
            vocab_size=Range(least=1, most=2**24),
            fim_rate=Range(least=0, most=1, use="use 0 for none, DeepSeek-V3 has 0.1"),
            prefetch=Range(least=0, most=64),
        )
        if self.source not in SOURCES:
            raise ConfigError(f"data.source={self.source!r} is not a data source: use {' or '.join(SOURCES)}")
        if self.source == "chat":
            self._check_chat()
        if self.source == "indexed" and not self.paths:
            raise ConfigError(
                "data.source=indexed needs at least 1 entry in data.paths, got 0: give the PREFIX of PREFIX.bin/.idx"
            )
        if self.source == "stdlib" and (self.paths or self.weights or self.validation_paths):
            raise ConfigError(
                "data.source=stdlib takes no data.paths, data.weights or data.validation_paths, "
                f"got {len(self.paths)}, {len(self.weights)} and {len(self.validation_paths)}: use data.source=indexed"
            )
        if len(self.fim_tokens) not in (0, 3):
            raise ConfigError(
                f"data.fim_tokens has {len(self.fim_tokens)} names and takes 3, for begin, hole and end: "
                "give three, or none for those that the tokenizer has"
            )
        self._check_weights()

    def _check_chat(self) -> None:
        if not self.paths:
            raise ConfigError(
                "data.source=chat needs at least 1 entry in data.paths, got 0: give a .jsonl or .parquet file of "
                "conversations, data.paths=[FILE]"
            )
        if self.fim_rate:
            raise ConfigError(
                f"data.fim_rate={self.fim_rate} would cut conversations of data.source=chat apart: use data.fim_rate=0"
            )

    def _check_weights(self) -> None:
        if not self.weights:
            return
        if len(self.weights) != len(self.paths):
            raise ConfigError(
                f"data.weights has {len(self.weights)} entries and data.paths has {len(self.paths)}: "
                "give one weight a path, or none for equal weights"
            )
        if sum(self.weights) == 0:
            raise ConfigError(f"data.weights has {len(self.weights)} entries, all 0: at least one must be above 0")


@dataclass(frozen=True)
class Document:
    """A file of the corpus: its path relative to the corpus, with forward slashes, and its text."""

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
    """The text of a Python file in the encoding it declares; None when it can't be decoded that way.

    Raises DataError where the file can't be read.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return raw.decode(encoding)
    except (SyntaxError, UnicodeDecodeError):
        return None


def read_corpus(root: Path) -> list[Document]:
    """All readable, non-empty files under `root`, sorted by name. Raises DataError when there are fewer than two."""
    documents = []
    for name in list_sources(root):
        text = read_source(root / name)
        if text:
            documents.append(Document(name, text))
    if len(documents) < 2:
        raise DataError(
            f"the embedded corpus needs at least 2 Python source files under {root}, found {len(documents)} "
            "(an interpreter installed without its sources?): use another Python or data.source=indexed"
        )
    return documents


def split_by_file(documents: list[Document], validation_share: float) -> tuple[list[Document], list[Document]]:
    """(train, validation), each in the order of `documents`; depends on names and sizes alone, neither is empty."""
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
    """SHA-256 over all names and texts."""
    digest = hashlib.sha256()
    for document in documents:
        text = document.text.encode()
        digest.update(f"{document.name}\0{len(text)}\0".encode())
        digest.update(text)
    return digest.hexdigest()
