"""Tokenizer: byte-level BPE by the `tokenizers` library, trained here or read from a tokenizer.json.

A tokenizer that is read must be byte-level or of Llama 2's kind, whose tokens, joined, are the UTF-8 bytes of the text
(`token_bytes`): only then are bits per byte exact. Any other kind is refused.

Special tokens have no bytes, and encoding never makes one from text: a file that contains the characters
`<|endoftext|>` is text like any other; only `encode_pieces` ends a document. Every vocabulary trained here reserves the
three fill-in-the-middle tokens, so that using them later changes no id.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fp8moe.data.durable import is_file, unreadable, write_text
from fp8moe.data.indexed import padded_vocabulary
from fp8moe.data.token_bytes import SPACE, cut_words, is_byte_level, is_metaspace, needs_cuts, without_prefix
from fp8moe.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
FIM_PREFIX = "<|fim_prefix|>"
FIM_SUFFIX = "<|fim_suffix|>"
FIM_MIDDLE = "<|fim_middle|>"
SPECIAL_TOKENS = (END_OF_TEXT, FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE)
# The end-of-text token of published byte-level tokenizers, most specific name first.
KNOWN_END_OF_TEXT = (END_OF_TEXT, "<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|eos|>", "<eos>", "</s>")
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
MAX_VOCAB_SIZE = 1 << 20  # four times that of the largest published tokenizers
MAX_IDS = 1 << 31  # of a token file's int32
_BATCH_CHARS = 4 << 20


@dataclass(frozen=True)
class TokenizerInfo:
    """The facts of a tokenizer that training needs.

    path: its tokenizer.json. size: one more than its largest id. end_of_text: the id that ends a document, or None.
    """

    path: Path
    size: int
    end_of_text: int | None


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE of at most `vocab_size` tokens (fewer when `texts` have too few pairs of tokens)."""
    if vocab_size > MAX_VOCAB_SIZE:  # for which the library would reserve memory, and end the process
        raise ConfigError(f"vocab_size={vocab_size} is more than can be trained: use at most {MAX_VOCAB_SIZE}")
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size={vocab_size} is too small: a byte-level vocabulary has 256 bytes and {len(SPECIAL_TOKENS)} "
            f"special tokens: use {MIN_VOCAB_SIZE} or more"
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
    """Reads a tokenizer.json; one of Llama 2's kind without its space in front of a text (`token_bytes`).

    Raises DataError when it is missing, unreadable, broken, or of a kind that loses bytes.
    """
    text = _read(path)
    try:
        tokenizer = Tokenizer.from_str(text.decode())
    except BaseException as error:  # the library raises bare Exception, and its panics derive from BaseException
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path} is not a tokenizer.json that the tokenizers library can read ({reason}): it is damaged or another "
            "kind of file, name a whole one"
        ) from error
    if not tokenizer.get_vocab_size():
        raise DataError(f"{path} has a vocabulary of 0 tokens: a tokenizer needs at least 1")
    if num_ids(tokenizer) > MAX_IDS:
        raise DataError(f"{path} has ids up to {num_ids(tokenizer) - 1} and token files hold ids below {MAX_IDS}")
    parts = json.loads(tokenizer.to_str())
    if is_byte_level(parts):
        return tokenizer
    if is_metaspace(parts):
        return Tokenizer.from_str(json.dumps(without_prefix(parts)))
    raise DataError(
        f"{path} is not a byte-level tokenizer (its decoder is not ByteLevel), nor one of {SPACE} with byte fallback "
        "that changes no other character, as Llama 2's: use one of them"
    )


def _read(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a tokenizer.json. Raises DataError."""
    if not is_file(Path(path)):
        if Path(path).is_dir():
            raise DataError(f"{path} is a folder and a tokenizer one file: use {Path(path, 'tokenizer.json')}")
        raise DataError(f"{path} does not exist: a tokenizer is one tokenizer.json file")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def save_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Writes a tokenizer.json, whole or not at all. Raises OSError."""
    write_text(Path(path), tokenizer.to_str(pretty=True))


def num_ids(tokenizer: Tokenizer) -> int:
    """One more than the largest id: the smallest vocabulary a model of this tokenizer may have."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def ids_apart(one: Tokenizer, other: Tokenizer) -> tuple[int, int]:
    """(ids that name other text in `other`, ids compared): those of both but special tokens, which may be renamed."""
    ours, theirs = ({id: token for token, id in each.get_vocab().items()} for each in (one, other))
    shared = (
        (ours.keys() & theirs.keys()) - one.get_added_tokens_decoder().keys() - other.get_added_tokens_decoder().keys()
    )
    return sum(ours[id] != theirs[id] for id in shared), len(shared)


def end_of_text_id(tokenizer: Tokenizer, name: str | None = None) -> int:
    """The id that ends a document: of token `name`, or of the first of KNOWN_END_OF_TEXT. Raises DataError."""
    for candidate in (name,) if name is not None else KNOWN_END_OF_TEXT:
        token_id = tokenizer.token_to_id(candidate)
        if token_id is not None:
            return int(token_id)
    wanted = repr(name) if name is not None else f"by any of the names {', '.join(KNOWN_END_OF_TEXT)}"
    raise DataError(f"the tokenizer has no end-of-text token {wanted}: give the name of one it has")


def encode_pieces(
    tokenizer: Tokenizer, pieces: Iterable[tuple[str, bool]], end_of_text: int
) -> Iterator[tuple[NDArray[np.int64], bool]]:
    """Encodes a stream of (text, ends its document) as a stream of (ids, ends its document).

    `end_of_text` is appended where a document ends. Pieces are encoded in parallel, 4 million characters at a time.
    """
    tokenizer.encode_special_tokens = True  # sic: special tokens found in text are then plain text
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
    cut = needs_cuts(tokenizer)
    texts = [cut_words(text) if cut else [text] for text, _ in batch]
    encodings = iter(tokenizer.encode_batch_fast([one for parts in texts for one in parts], add_special_tokens=False))
    for parts, (_, ends) in zip(texts, batch, strict=True):
        ids = [id_ for _ in parts for id_ in next(encodings).ids]
        yield np.array([*ids, end_of_text] if ends else ids, dtype=np.int64), ends


def check_size(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ConfigError when the tokenizer has ids that are not below `vocab_size`."""
    size = num_ids(tokenizer)
    if size > vocab_size:
        raise ConfigError(
            f"the tokenizer has ids up to {size - 1} and data.vocab_size, by default the model's vocabulary, is "
            f"{vocab_size}: use model.vocab_size={padded_vocabulary(size)}"
        )


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a tokenizer.json. Raises DataError when it can't be read."""
    return hashlib.sha256(_read(path)).hexdigest()


def tokenizer_beside(prefixes: Sequence[str]) -> Path | None:
    """PREFIX.tokenizer.json of the token files `prefixes`; None when none has one. Raises DataError if two differ."""
    present = [path for path in (Path(f"{prefix}.tokenizer.json") for prefix in prefixes) if is_file(path)]
    for path in present[1:]:
        if file_hash(path) != file_hash(present[0]):
            raise DataError(
                f"{present[0]} and {path} differ: token files of different tokenizers can't be mixed: "
                "encode the text of both with one"
            )
    return present[0] if present else None


def check_beside(given: Path, prefixes: Sequence[str]) -> None:
    """Raise DataError where token files were encoded by a tokenizer whose ids name other text than those of `given`."""
    for prefix in prefixes:
        beside = Path(f"{prefix}.tokenizer.json")
        if not is_file(beside) or file_hash(beside) == file_hash(given):
            continue
        apart, shared = ids_apart(load_tokenizer(given), load_tokenizer(beside))
        if apart:
            raise DataError(
                f"{prefix}.bin was encoded with {beside}, of whose {shared:,} ids {apart:,} name other text in "
                f"{given}: encode the text with the latter (fp8moe tokenize --tokenizer)"
            )
