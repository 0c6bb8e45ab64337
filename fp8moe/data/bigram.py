"""Byte bigram model: the baseline that a language model must beat, in bits per byte of the same samples. Its symbols
are the 256 bytes and one "end" for a token without bytes (end-of-text); P(b | a) = (count(a, b) + 1) / (count(a) + 257)
with counts over training text. Both models must predict the end and neither counts it as a byte, so they compare:

    model:   sum of nats over predicted tokens / ln 2 / sum of `token_bytes` over predicted tokens
    bigram:  sum of bits over the symbols of predicted tokens / the same sum of bytes

It reads tokens and takes their bytes from the vocabulary, so it also measures token files written elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fp8moe.data.packing import IGNORED_LABEL, Batch, Dataset

END_SYMBOL = 256
NUM_SYMBOLS = 257
_CHUNK_TOKENS = 1 << 18


class ByteBigram:
    """The byte bigram model: counts pairs of symbols, and scores text by them (see the top of this module).

    token_strings: the bytes of each token id, empty for special tokens.
    counts: int64 [257, 257], how often the second symbol followed the first in the batches counted.
    """

    def __init__(self, token_strings: Sequence[bytes]) -> None:
        symbols = [np.frombuffer(string, dtype=np.uint8).astype(np.int64) for string in token_strings]
        symbols = [string if string.size else np.array([END_SYMBOL]) for string in symbols]
        self._lengths = np.array([string.size for string in symbols], dtype=np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._symbols = np.concatenate(symbols)
        self.counts = np.zeros((NUM_SYMBOLS, NUM_SYMBOLS), dtype=np.int64)

    def _pairs(self, batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(symbol before, symbol) for every symbol of every predicted token of a batch."""
        inputs_BS, labels_BS = batch.inputs_BS.numpy(), batch.labels_BS.numpy()
        # The windows again: inputs and last label. A masked last label is not predicted, so any id may replace it.
        tokens = np.concatenate([inputs_BS, np.maximum(labels_BS[:, -1:], 0)], axis=1)
        predicted = np.zeros(tokens.shape, dtype=bool)
        predicted[:, 1:] = labels_BS != IGNORED_LABEL
        flat = tokens.reshape(-1)
        lengths = self._lengths[flat]
        owner = np.repeat(np.arange(flat.size), lengths)
        within = np.arange(owner.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        symbols = self._symbols[self._starts[flat][owner] + within]
        wanted = predicted.reshape(-1)[owner]
        return symbols[:-1][wanted[1:]], symbols[1:][wanted[1:]]

    def count(self, batch: Batch) -> None:
        """Adds the predicted tokens of a batch to the counts."""
        before, symbol = self._pairs(batch)
        flat = np.bincount(before * NUM_SYMBOLS + symbol, minlength=NUM_SYMBOLS**2)
        self.counts += flat.reshape(NUM_SYMBOLS, NUM_SYMBOLS)

    def score(self, batch: Batch) -> tuple[float, int]:
        """(bits, bytes) of the predicted tokens of a batch."""
        before, symbol = self._pairs(batch)
        seen = self.counts.sum(axis=1)
        bits = np.log2(seen[before] + NUM_SYMBOLS) - np.log2(self.counts[before, symbol] + 1)
        return float(bits.sum()), int((symbol != END_SYMBOL).sum())


def _chunks(dataset: Dataset, num_samples: int) -> Iterator[Batch]:
    per_chunk = max(1, _CHUNK_TOKENS // dataset.window(0).tokens.size)
    for start in range(0, num_samples, per_chunk):
        yield dataset.batch(range(start, min(start + per_chunk, num_samples)))


def bigram_bits_per_byte(
    train: Dataset,
    validation: Dataset,
    token_strings: Sequence[bytes],
    *,
    validation_samples: int | None = None,
    train_tokens: int = 1 << 24,
) -> float:
    """Bits per byte of `validation` under a byte bigram model counted over one epoch of `train`.

    validation_samples: number of samples scored, from the first; None: one epoch.
    train_tokens: number of tokens counted at most, about; the 66,049 probabilities change little after that.
    """
    model = ByteBigram(token_strings)
    seq_len = train.window(0).tokens.size - 1
    for batch in _chunks(train, min(len(train), max(1, train_tokens // seq_len))):
        model.count(batch)
    scores = [model.score(batch) for batch in _chunks(validation, validation_samples or len(validation))]
    bits, num_bytes = sum(bits for bits, _ in scores), sum(count for _, count in scores)
    return bits / max(1, num_bytes)
