"""Identity of a run's data, by content: what must be the same for a resumed run to read on in the same text.

The identity is kept in every checkpoint. Paths and modification times are no part of it, so that a run and its data may
move; of a large file, its size and blocks spread over it are hashed, not every byte.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fp8moe.data.durable import unreadable
from fp8moe.errors import ConfigError

NO_FIM = "data.fim_rate=0"
BLOCKS, BLOCK_BYTES = 64, 1 << 16
CHANGES = ("data", "tokenizer", "document_mask", "validation_share", "packing", "fim")  # what `resume_changes` may name


def content_hash(path: Path) -> str:
    """SHA-256 of a file's size and of 64 blocks of 64 KiB spread evenly over it, the first and the last included.

    Raises DataError where it can't be read.
    """
    try:
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with open(path, "rb") as handle:
            for block in range(BLOCKS):
                start = max(0, size - BLOCK_BYTES) * block // (BLOCKS - 1)
                handle.seek(start)
                digest.update(handle.read(BLOCK_BYTES))
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()


@dataclass(frozen=True)
class DataIdentity:
    """Hashes of the training and validation text with their mixture, and of the tokenizer; the settings that change
    what a model sees of them.

    fim: rate and names of fill-in-the-middle, in words. The defaults are those of checkpoints without packing and FIM.
    """

    train: str
    validation: str
    tokenizer: str | None
    document_mask: bool
    validation_share: float
    packing: str = "stream"
    fim: str = NO_FIM

    @property
    def text(self) -> tuple[str, str]:
        """Training and validation text."""
        return self.train, self.validation

    def as_stored(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def short(value: object) -> str:
    """A stored field for a reader: a hash by its beginning, anything else whole."""
    is_hash = isinstance(value, str) and re.fullmatch(r"[0-9a-f]{16,}", value) is not None
    return str(value)[:12] if is_hash else str(value).lower() if isinstance(value, bool) else str(value)


def check_same_data(where: object, stored: dict[str, Any], here: DataIdentity, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless the data is that of the checkpoint at `where`, but for what `resume_changes` allows.

    Of several causes the first is named: another share held out and another tokenizer change the text's hash as well.
    """
    there = DataIdentity(**stored)
    if there.document_mask != here.document_mask:
        mask, ours = str(there.document_mask).lower(), str(here.document_mask).lower()
        _refuse(where, "document_mask", f"with data.document_mask={mask} and this run has {ours}: use {mask}", allowed)
    if there.validation_share != here.validation_share:
        share = there.validation_share
        sentence = f"with data.validation_share={share} and this run has {here.validation_share}"
        _refuse(where, "validation_share", f"{sentence}, so that it would train on held-out text: use {share}", allowed)
    if there.packing != here.packing:
        sentence = f"with data.packing={there.packing} and this run has {here.packing}: use {there.packing}"
        _refuse(where, "packing", sentence, allowed)
    if there.fim != here.fim:
        _refuse(where, "fim", f"with {there.fim} and this run has {here.fim}: use the former", allowed)
    if there.tokenizer != here.tokenizer:
        advice = "use data.tokenizer=PATH of its run's tokenizer.json"
        _refuse(where, "tokenizer", f"with another tokenizer than this run's: {advice}", allowed)
    elif there.validation_share == here.validation_share and there.text != here.text:
        _refuse(where, "data", "on other text than this run reads: use its own data settings", allowed)


def _refuse(where: object, change: str, sentence: str, allowed: tuple[str, ...]) -> None:
    if change not in allowed:
        raise ConfigError(f"{where} was trained {sentence}, or resume_changes=[{change}] if it is meant")
