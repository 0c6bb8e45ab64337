"""The vocabulary of a run's data: a tokenizer with the bytes of every id of the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from fp8moe.data.token_bytes import token_byte_strings
from fp8moe.data.tokenizer import check_size, end_of_text_id, load_tokenizer
from fp8moe.errors import DataError


@dataclass(frozen=True)
class ByteVocabulary:
    """strings: the bytes of each id of the model, empty for special tokens and unused ids.

    end_of_text: the id that ends a document; None where the tokenizer has none by a known name.
    """

    tokenizer: Tokenizer
    strings: list[bytes]
    end_of_text: int | None


def load_vocabulary(path: Path, vocab_size: int) -> ByteVocabulary:
    """The vocabulary of the tokenizer.json at `path` in a model of `vocab_size`. Raises DataError and ConfigError."""
    tokenizer = load_tokenizer(path)
    check_size(tokenizer, vocab_size)
    strings = token_byte_strings(tokenizer)
    strings += [b""] * (vocab_size - len(strings))
    try:
        end = end_of_text_id(tokenizer)
    except DataError:
        end = None  # token files already mark where documents end
    return ByteVocabulary(tokenizer, strings, end)
