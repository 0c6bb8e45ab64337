"""Fill-in-the-middle (FIM): a share of the training documents becomes prefix, suffix, middle, as for DeepSeek-V3.

    <|fim_begin|> prefix <|fim_hole|> suffix <|fim_end|> middle <|eos|>        (PSM; arXiv 2412.19437, section 4.1)

Which documents, and where they are cut, depends on (seed, epoch, document) alone, so nothing is stored in a checkpoint
and another epoch has other documents and cuts. It is done on the fly, per document, before packing, whose index of an
epoch holds the documents' new lengths; so every token of the text still is seen exactly once an epoch.

Both cuts are drawn evenly from the places between two characters, the document's ends included, so that a model learns
to go on in the middle of a word. A cut is made on the bytes of the tokens: the tokens up to NEAR before and behind it
are encoded anew on both sides, the others stay as they are, since a byte pair encoder looks no farther than a word. So
what a cut encodes does not grow with its document. Where the text of the new ids is not the same bytes (a tokenizer
that normalizes or adds a space, text that is not UTF-8), the cut is made before the token that holds it.

Refused: encoding whole parts anew, which a book would pay once for every sample it reaches into; and FIM of packed
samples, which mixes documents and drops tokens.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fp8moe.data.cache import key_of
from fp8moe.data.identity import NO_FIM
from fp8moe.data.sources import DataConfig
from fp8moe.data.vocabulary import load_vocabulary
from fp8moe.errors import ConfigError, DataError

NEAR = 32
# Begin, hole, end of published tokenizers; those of vocabularies trained here are the second.
KNOWN_SENTINELS = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)
_FORMAT = 1
logger = logging.getLogger(__name__)
_CHOICE, _CUTS = 1, 2  # streams of random numbers


def sentinel_ids(tokenizer: Tokenizer, names: Sequence[str]) -> tuple[int, ...]:
    """The ids of the three sentinels `names`, or of the first of KNOWN_SENTINELS that the tokenizer has if () is given.

    Raises DataError with the nearest names that it has.
    """
    candidates = [tuple(names)] if names else KNOWN_SENTINELS
    for trio in candidates:
        ids = [token for token in map(tokenizer.token_to_id, trio) if token is not None]
        if len(ids) == len(trio):
            return tuple(ids)
    missing = next(name for name in candidates[0] if tokenizer.token_to_id(name) is None)
    has = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    nearest = difflib.get_close_matches(missing, has, n=1, cutoff=0.0)
    advice = f"the nearest that it has is {nearest[0]!r}" if nearest else "use data.fim_rate=0, as it has none like it"
    raise DataError(f"the tokenizer has no token {missing!r}, which data.fim_tokens names: {advice}")


def open_fim(config: DataConfig, path: Path | None, seed: int) -> FillInTheMiddle | None:
    """FIM with the tokenizer.json at `path`; None where `data.fim_rate` is 0. Raises ConfigError and DataError."""
    if config.fim_rate == 0:
        return None
    if path is None:
        raise ConfigError(
            f"data.fim_rate={config.fim_rate} needs a tokenizer and no path of data.paths has PREFIX.tokenizer.json: "
            "set data.tokenizer, or data.fim_rate=0"
        )
    vocabulary = load_vocabulary(path, config.vocab_size)
    tokenizer, sentinels = vocabulary.tokenizer, sentinel_ids(vocabulary.tokenizer, config.fim_tokens)
    names = ", ".join(str(tokenizer.id_to_token(sentinel)) for sentinel in sentinels)
    logger.info("fill-in-the-middle of %g of the training documents, by %s", config.fim_rate, names)
    return FillInTheMiddle(config.fim_rate, tokenizer, vocabulary.strings, sentinels, vocabulary.end_of_text, seed)


def fim_in_words(config: DataConfig) -> str:
    """The settings of FIM for the identity of a run's data."""
    if config.fim_rate == 0:
        return NO_FIM
    names = f" data.fim_tokens=[{','.join(config.fim_tokens)}]" if config.fim_tokens else ""
    return f"data.fim_rate={config.fim_rate:g}{names}"


class FillInTheMiddle:
    """FIM of documents of one tokenizer.

    rate: share of the documents. strings: the bytes of each id, empty for special tokens. sentinels: ids of begin,
    hole, end. end_of_text: the id that stays last where a document ends with it; None: there is none.
    """

    def __init__(
        self,
        rate: float,
        tokenizer: Tokenizer,
        strings: Sequence[bytes],
        sentinels: Sequence[int],
        end_of_text: int | None,
        seed: int,
    ) -> None:
        tokenizer.encode_special_tokens = True  # sic: special tokens found in text are then plain text
        self._tokenizer, self._strings = tokenizer, strings
        self._rate, self._sentinels, self._end, self._seed = rate, tuple(sentinels), end_of_text, seed
        self._chars = np.array([len(_beginnings(string)) for string in strings], dtype=np.int64)
        self.key = key_of(_FORMAT, rate, self._sentinels, end_of_text, seed, tokenizers.__version__, tokenizer.to_str())

    def chosen(self, num_documents: int, epoch: int) -> NDArray[np.int64]:
        """The numbers below `num_documents` of the documents of an epoch that FIM is applied to, ascending."""
        draws = self._random(epoch, _CHOICE).random_sample(num_documents)
        return np.flatnonzero(draws < self._rate).astype(np.int64)

    def apply(self, ids: NDArray[np.int64], document: int, epoch: int) -> NDArray[np.int64]:
        """The ids of a document with its middle behind its suffix; a document without text stays as it is."""
        ends = self._end is not None and len(ids) > 0 and ids[-1] == self._end
        body, tail = (ids[:-1], ids[-1:]) if ends else (ids, ids[:0])
        num_chars = int(self._chars[body].sum())
        if num_chars == 0:
            return ids
        one, other = self._random(epoch, _CUTS, document).randint(0, num_chars + 1, 2, dtype=np.int64).tolist()
        prefix, rest = self.split(body, min(one, other))
        middle, suffix = self.split(rest, abs(one - other))
        begin, hole, end = (np.array([sentinel], dtype=np.int64) for sentinel in self._sentinels)
        return np.concatenate([begin, prefix, hole, suffix, end, middle, tail])

    def split(self, ids: NDArray[np.int64], num_chars: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The ids of the first `num_chars` characters, and of the others; see the top of this module."""
        counts = np.cumsum(self._chars[ids])
        if num_chars == 0:
            return ids[:0], ids
        at = int(np.searchsorted(counts, num_chars, side="right"))
        if at == len(ids):
            return ids, ids[:0]
        string = self._strings[ids[at]]
        place = _beginnings(string)[num_chars - (int(counts[at - 1]) if at else 0)]
        low, high = self._around(ids, at)
        left = b"".join(self._strings[one] for one in ids[low:at]) + string[:place]
        right = string[place:] + b"".join(self._strings[one] for one in ids[at + 1 : high])
        new_left, new_right = self._encode(left), self._encode(right)
        if new_left is None or new_right is None:
            return ids[:at], ids[at:]
        return np.concatenate([ids[:low], new_left]), np.concatenate([new_right, ids[high:]])

    def _around(self, ids: NDArray[np.int64], at: int) -> tuple[int, int]:
        """The tokens around `at` that are encoded anew: [low, high), without special tokens, of whole characters."""
        low = high = at
        while low > 0 and self._strings[ids[low - 1]] and (at - low < NEAR or self._continues(ids[low])):
            low -= 1
        high += 1
        while high < len(ids) and self._strings[ids[high]] and (high - at <= NEAR or self._continues(ids[high])):
            high += 1
        return low, high

    def _continues(self, token: int) -> bool:
        """Whether a token begins within a character."""
        return _continues(self._strings[token][0])

    def _encode(self, text: bytes) -> NDArray[np.int64] | None:
        """The ids of `text`; None where they are not those bytes."""
        try:
            ids = self._tokenizer.encode(text.decode(), add_special_tokens=False).ids
        except UnicodeDecodeError:
            return None
        return np.array(ids, dtype=np.int64) if b"".join(self._strings[one] for one in ids) == text else None

    def _random(self, epoch: int, *stream: int) -> np.random.RandomState:
        words = [word for number in (self._seed, epoch, *stream) for word in (number & 0xFFFFFFFF, number >> 32)]
        return np.random.RandomState(words)


def _continues(byte: int) -> bool:
    return byte & 0xC0 == 0x80


def _beginnings(string: bytes) -> list[int]:
    """The places of the bytes with which a character begins in UTF-8."""
    return [place for place, byte in enumerate(string) if not _continues(byte)]
