"""Byte-level BPE by the `tokenizers` library: trained here or read from a tokenizer.json.

Byte level means that every token is a string of bytes and that the tokens of a text, put end to end, are its UTF-8
bytes. Only then is "bits per byte" exact, comparable among tokenizers and with a model of plain bytes; a tokenizer of
another kind (SentencePiece with its `▁`) is refused rather than counted approximately.

Special tokens stand for no bytes. Encoding never produces one from text: a file that happens to contain the characters
`<|endoftext|>` is text like any other, and only `encode_pieces` ends a document. The three fill-in-the-middle tokens
are reserved in every vocabulary trained here, so that a later use of them does not change any id.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fp8moe.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
FIM_PREFIX = "<|fim_prefix|>"
FIM_SUFFIX = "<|fim_suffix|>"
FIM_MIDDLE = "<|fim_middle|>"
SPECIAL_TOKENS = (END_OF_TEXT, FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE)
# What published byte-level tokenizers call it, most specific first.
KNOWN_END_OF_TEXT = (END_OF_TEXT, "<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|eos|>", "<eos>", "</s>")
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
_BATCH_CHARS = 4 << 20


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens (fewer when `texts` have too few pairs), decided by `texts`."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size={vocab_size} is too small: a byte-level vocabulary has 256 bytes and {len(SPECIAL_TOKENS)} "
            f"special tokens, use {MIN_VOCAB_SIZE} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads a tokenizer.json. Raises DataError when it is missing, broken, or not byte-level."""
    if not Path(path).is_file():
        raise DataError(f"{path} does not exist: a tokenizer is one tokenizer.json file")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path} is no tokenizer.json the tokenizers library can read ({error})") from error
    if not _is_byte_level(json.loads(tokenizer.to_str()).get("decoder")):
        raise DataError(f"{path} is not a byte-level tokenizer (its decoder is not ByteLevel): use a byte-level BPE")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Writes a tokenizer.json, whole or not at all."""
    final = Path(path)
    scratch = final.with_name(f".{final.name}.{os.getpid()}")
    try:
        scratch.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        scratch.replace(final)
    finally:
        scratch.unlink(missing_ok=True)


def _is_byte_level(decoder: dict[str, object] | None) -> bool:
    if decoder is None:
        return False
    inner = decoder.get("decoders")
    if isinstance(inner, list):
        return any(_is_byte_level(part) for part in inner)
    return decoder.get("type") == "ByteLevel"


def num_ids(tokenizer: Tokenizer) -> int:
    """One more than the largest id: what a model's vocabulary must have at least."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def end_of_text_id(tokenizer: Tokenizer, name: str | None = None) -> int:
    """The id that ends a document: token `name`, or the first known one. Raises DataError when there is none."""
    for candidate in (name,) if name is not None else KNOWN_END_OF_TEXT:
        token_id = tokenizer.token_to_id(candidate)
        if token_id is not None:
            return int(token_id)
    wanted = repr(name) if name is not None else f"any of {', '.join(KNOWN_END_OF_TEXT)}"
    raise DataError(f"the tokenizer has no end-of-text token {wanted}: name the one it has")


def _byte_of_character() -> dict[str, int]:
    """The printable character by which byte-level vocabularies write each byte (source: GPT-2's released encoder).

    Bytes that print as themselves in Latin-1 stand for themselves; the other 68 take the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    mapping = {chr(byte): byte for byte in printable}
    mapping.update({chr(0x100 + i): byte for i, byte in enumerate(hidden)})
    return mapping


def token_byte_strings(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes each id stands for, by id; empty for special tokens and unused ids."""
    byte_of = _byte_of_character()
    added = tokenizer.get_added_tokens_decoder()
    strings = [b""] * num_ids(tokenizer)
    for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        if token_id in added:
            strings[token_id] = b"" if added[token_id].special else token.encode()
            continue
        try:
            strings[token_id] = bytes(byte_of[character] for character in token)
        except KeyError:
            raise DataError(
                f"token {token_id} of the tokenizer, {token!r}, is not written in the 256 byte-level characters: "
                "use a byte-level BPE"
            ) from None
    return strings


def encode_pieces(
    tokenizer: Tokenizer, pieces: Iterable[tuple[str, bool]], end_of_text: int
) -> Iterator[tuple[NDArray[np.int64], bool]]:
    """Turns a stream of (text, ends its document) into a stream of (ids, ends its document).

    `end_of_text` is appended where a document ends. Pieces are encoded in parallel, a few MB of text at a time.
    """
    tokenizer.encode_special_tokens = True  # means: treat special tokens found in the text as plain text
    batch: list[tuple[str, bool]] = []
    chars = 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece[0])
        if chars >= _BATCH_CHARS:
            yield from _encode_batch(tokenizer, batch, end_of_text)
            batch, chars = [], 0
    if batch:
        yield from _encode_batch(tokenizer, batch, end_of_text)


def _encode_batch(
    tokenizer: Tokenizer, batch: list[tuple[str, bool]], end_of_text: int
) -> Iterator[tuple[NDArray[np.int64], bool]]:
    encodings = tokenizer.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
    for encoding, (_, ends) in zip(encodings, batch, strict=True):
        yield np.array([*encoding.ids, end_of_text] if ends else encoding.ids, dtype=np.int64), ends
