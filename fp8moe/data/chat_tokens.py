"""Conversations as token files with a mask: which tokens the assistant wrote, and so are learned.

A chat file is rendered and encoded once and kept in the cache as PREFIX.bin and PREFIX.idx, a conversation a document,
beside PREFIX.mask: one byte a token, 1 where it is learned. Packing, order and epochs are then those of any token file.
hashes.npy has a hash of each one's tokens, by which conversations that are trained on and held out as well are found.

The parts of a conversation that the assistant wrote and those it did not are encoded apart, so no token lies across
their border: the tokens before it are those of the prompt that `fp8moe generate --chat` encodes, and those behind it
are what the model has to give out. Refused: encoding the whole text and looking up places of characters, where a token
may begin in the question and end in the answer. Names of special tokens in a template stand for those tokens; so they
do in messages, as in `transformers` and vLLM.

What is left out is counted, not refused, since published sets have such rows: a conversation without an answer, of
which nothing is to be learned; one longer than a sample where `data.long_conversations=drop`, or where truncating it
leaves nothing of an answer.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fp8moe.data.cache import built_folder, key_of
from fp8moe.data.chat_rows import Conversation, read_conversations
from fp8moe.data.chat_template import WRITE, ChatTemplate, Message
from fp8moe.data.durable import unreadable
from fp8moe.data.identity import content_hash
from fp8moe.data.indexed import IndexedDataset, IndexedWriter
from fp8moe.data.packing import Dataset, PackedDataset
from fp8moe.data.sampler import BlendedDataset
from fp8moe.data.tokenizer import check_size
from fp8moe.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_FORMAT = 2
_ROWS = 512  # encoded together
_PREFIX, _HASHES = "tokens", "hashes.npy"


@dataclass
class Counts:
    """Conversations of a file: those read; left out without an answer and for their length; truncated. Tokens that are
    kept, and those of them that are learned."""

    conversations: int = 0
    unanswered: int = 0
    too_long: int = 0
    truncated: int = 0
    tokens: int = 0
    learned: int = 0

    @property
    def kept(self) -> int:
        return self.conversations - self.unanswered - self.too_long


class ChatTokens(IndexedDataset):
    """Token files of conversations. predicted: uint8, as long as `tokens`, 1 where a token is learned. hashes: uint64,
    of each conversation's tokens."""

    def __init__(self, prefix: Path, name: Path) -> None:
        """name: of the chat file, for messages and tables. Raises DataError."""
        super().__init__(prefix)
        mask, self.prefix = Path(f"{prefix}.mask"), str(name)
        try:
            if mask.stat().st_size != len(self.tokens):
                raise DataError(f"{mask} has not one byte a token: delete {mask.parent}")
            self.predicted = np.memmap(mask, dtype=np.uint8, mode="r")
            self.counts = Counts(**json.loads((mask.parent / "counts.json").read_text()))
            self.hashes: NDArray[np.uint64] = np.load(mask.parent / _HASHES)
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise DataError(f"the cached {mask.parent} can't be read ({error}): delete it") from error
        self._mask = mask

    def content(self) -> str:
        """A hash of tokens and mask, whatever the path. Raises DataError."""
        return f"{super().content()}-{content_hash(self._mask)}"

    def described(self) -> str:
        """The file's counts as a line."""
        c = self.counts
        left_out = [
            f"{number:,} {what}"
            for number, what in (
                (c.unanswered, "without an answer left out"),
                (c.too_long, "too long left out"),
                (c.truncated, "truncated"),
            )
            if number
        ]
        rows = ", ".join([f"{c.conversations:,} conversations", *left_out])
        return f"{Path(self.prefix).name}: {rows}; {c.learned / c.tokens:.1%} of the tokens are learned"


def described(train: Dataset, validation: Dataset) -> list[str]:
    """A line on each file of conversations that are trained on, and one on those that are held out as well; none for
    text."""
    mine = _hashes(train)
    held = [hashes for _, hashes in _hashes(validation)]
    lines = [tokens.described() for tokens, _ in mine]
    counts = [(int(np.isin(hashes, np.concatenate(held)).sum()), tokens) for tokens, hashes in mine] if held else []
    found = [f"{count:,} of {Path(tokens.prefix).name}" for count, tokens in counts if count]
    if found:
        lines.append(f"conversations that are trained on and held out as well, token for token: {', '.join(found)}")
    return lines


def _hashes(dataset: Dataset) -> list[tuple[ChatTokens, NDArray[np.uint64]]]:
    """Each file of conversations of a data set, and the hashes of those that are in it."""
    parts = dataset.sources if isinstance(dataset, BlendedDataset) else [dataset]
    return [
        (part.source, part.source.hashes[part.documents])
        for part in parts
        if isinstance(part, PackedDataset) and isinstance(part.source, ChatTokens)
    ]


def encode_conversation(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """(ids int64, uint8 1 where the assistant wrote them) of a conversation. Raises ConfigError."""
    return next(_encoded(tokenizer, [template.parts(messages)]))


def encode_asked(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The ids behind which the assistant answers, as in training. Raises ConfigError."""
    tokenizer.encode_special_tokens = False  # sic: false makes tokens of their names
    texts = tokenizer.encode_batch_fast(template.asked(messages), add_special_tokens=False)
    return [one for text in texts for one in text.ids]


def end_of_turn(template: ChatTemplate, tokenizer: Tokenizer) -> int | None:
    """The added token that ends an answer; None where the template has none."""
    try:
        ids, mask = encode_conversation(
            template, tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        )
    except ConfigError:
        return None
    last = int(ids[mask > 0][-1]) if mask.any() else None
    return last if last is not None and tokenizer.id_to_token(last) in template.added else None


def _encoded(
    tokenizer: Tokenizer, conversations: list[list[tuple[str, bool]]]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    tokenizer.encode_special_tokens = False  # sic: false makes tokens of their names
    texts = [text for parts in conversations for text, _ in parts]
    encodings = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    for parts in conversations:
        found = [(next(encodings).ids, learned) for _, learned in parts]
        ids = [one for part, _ in found for one in part]
        mask = [learned for part, learned in found for _ in part]
        yield np.array(ids, dtype=np.int64), np.array(mask, dtype=np.uint8)


def open_chat_tokens(
    path: Path,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    seq_len: int,
    drops: bool,
    cache: Path,
) -> ChatTokens:
    """The token files of a chat file, made if they are not in the cache.

    drops: a conversation of more than seq_len + 1 tokens, a sample's, is left out; else truncated.
    Raises DataError, naming file and row, and ConfigError.
    """
    check_size(tokenizer, vocab_size)
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    key = key_of(
        *(_FORMAT, str(path.resolve()), status.st_size, status.st_mtime_ns, content_hash(path)),
        *(template.text, dict(template.names), tokenizer.to_str(), vocab_size, seq_len, drops),
    )

    def build(folder: Path) -> None:
        logger.info("tokenizing the conversations of %s; later runs read them from the cache", path)
        counts, hashes = Counts(), bytearray()
        with (
            IndexedWriter(folder / _PREFIX, vocab_size) as writer,
            open(folder / f"{_PREFIX}.mask", "wb") as mask_file,
        ):
            for ids, mask in _kept(path, template, tokenizer, seq_len + 1, drops, counts):
                writer.write(ids)
                writer.end_document()
                mask_file.write(mask.tobytes())
                hashes += hashlib.blake2b(ids.tobytes(), digest_size=8).digest()
            if not counts.kept:
                raise DataError(
                    f"{path} has {counts.conversations} conversations, {counts.unanswered} without an answer of the "
                    f"assistant and {counts.too_long} longer than a sample of seq_len + 1 = {seq_len + 1} tokens, so "
                    "there is nothing to learn: add answers, or raise seq_len"
                )
        np.save(folder / _HASHES, np.frombuffer(bytes(hashes), dtype=np.uint64))
        (folder / "counts.json").write_text(json.dumps(asdict(counts)))

    return ChatTokens(built_folder(cache, f"chat-{key}", build) / _PREFIX, path)


def _kept(
    path: Path, template: ChatTemplate, tokenizer: Tokenizer, capacity: int, drops: bool, counts: Counts
) -> Iterator[tuple[NDArray[Any], NDArray[np.uint8]]]:
    """Ids and mask of the conversations that are kept, which `counts` counts."""
    rows, silenced = read_conversations(path), 0
    while some := list(islice(rows, _ROWS)):
        parts = [rendered(template, place, messages) for place, messages in some]
        answered = [of_one for of_one in parts if any(learned for _, learned in of_one)]
        silenced += sum(is_silenced(of_one, messages) for of_one, (_, messages) in zip(parts, some, strict=True))
        counts.conversations += len(some)
        counts.unanswered += len(some) - len(answered)
        for ids, mask in _encoded(tokenizer, answered):
            is_long = len(ids) > capacity
            if is_long and (drops or not mask[1:capacity].any()):
                counts.too_long += 1
                continue
            counts.truncated += is_long
            ids, mask = ids[:capacity], mask[:capacity]
            counts.tokens, counts.learned = counts.tokens + len(ids), counts.learned + int(mask.sum())
            yield ids, mask
    if silenced and counts.unanswered == counts.conversations:
        raise ConfigError(
            f"{template.source} writes nothing of what the assistant says in {path}, where {silenced} of "
            f"{counts.conversations} conversations have an answer: {WRITE}"
        )


def is_silenced(parts: Sequence[tuple[str, bool]], messages: Conversation) -> bool:
    """Whether a conversation has an answer and its text, in parts, nothing of it."""
    says = any(one["role"] == "assistant" and one["content"].strip() for one in messages)
    return says and not any(learned for _, learned in parts)


def rendered(template: ChatTemplate, place: str, messages: Conversation) -> list[tuple[str, bool]]:
    """The parts of a row's text. Raises DataError, naming the row."""
    try:
        return template.parts(messages)
    except ConfigError as error:
        raise DataError(f"{place}: {error}") from error
