"""From a `DataConfig` to data sets: the one entrance to this floor.

One process a job prepares, the others wait at the caller's barrier and then find everything in the cache; a process
whose node does not share that cache prepares it itself. What is prepared, each under a name made from all that
determines it:
- `stdlib-*`: tokenizer, train and validation token files of the embedded corpus (about 4 s on two cores);
- `checked-*`: an empty folder, once every id of a file was seen to be inside the vocabulary;
- `order-*`: the sample order of an epoch; `bigram-*`: the baseline figure.

Validation always uses the order of seed 0, so that its first K samples are the same text in every run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from fp8moe.data import corpus
from fp8moe.data.bigram import bigram_bits_per_byte
from fp8moe.data.blend import BlendedDataset
from fp8moe.data.cache import built_folder, cache_root, key_of
from fp8moe.data.config import DataConfig
from fp8moe.data.indexed import IndexedDataset, IndexedWriter
from fp8moe.data.packing import Dataset, PackedDataset, every_document, split_documents
from fp8moe.data.tokenizer import (
    encode_pieces,
    end_of_text_id,
    load_tokenizer,
    num_ids,
    save_tokenizer,
    token_byte_strings,
    train_tokenizer,
)
from fp8moe.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_STDLIB_FORMAT = 1
_BIGRAM_FORMAT = 1
_VALIDATION_SEED = 0


@dataclass(frozen=True)
class TokenizerInfo:
    """path: its tokenizer.json. size: one more than its largest id. end_of_text: ends a document; None: unknown."""

    path: Path
    size: int
    end_of_text: int | None


@dataclass(frozen=True)
class Data:
    """What training needs to know of its data.

    token_bytes: int64 [vocab_size], bytes each id stands for, 0 for special tokens and unused ids; None without a
        tokenizer. Bits per byte = sum of nats over predicted tokens / ln 2 / sum of token_bytes over their labels.
    bigram_bits_per_byte: the same figure of a byte bigram model on the same validation text; None without a tokenizer.
    """

    train: Dataset
    validation: Dataset
    vocab_size: int
    tokenizer: TokenizerInfo | None
    token_bytes: Tensor | None
    bigram_bits_per_byte: float | None


def open_data(
    config: DataConfig,
    *,
    seq_len: int,
    seed: int,
    is_first: bool = True,
    barrier: Callable[[], None] = lambda: None,
    validation_samples: int | None = None,
) -> Data:
    """Prepares (once) and opens the data.

    seq_len: tokens a sample predicts. seed: of the training order, the `Sampler`'s too.
    is_first: this process prepares while the others wait in `barrier`; exactly one of a job.
    validation_samples: how many validation samples the caller will judge by (the bigram is measured on these); None:
        one epoch.
    Raises ConfigError and DataError.
    """
    if not is_first:
        barrier()
    root = cache_root(config.cache_dir)
    if config.source == "stdlib":
        data = _open_stdlib(config, root, seq_len, seed, validation_samples)
    else:
        data = _open_indexed(config, root, seq_len, seed, validation_samples)
    if is_first:
        barrier()
    return data


def _open_stdlib(config: DataConfig, root: Path, seq_len: int, seed: int, validation_samples: int | None) -> Data:
    library = corpus.standard_library_root()
    documents = corpus.read_corpus(library)
    given = "trained" if config.tokenizer is None else _file_hash(config.tokenizer)
    key = key_of(
        _STDLIB_FORMAT,
        list(sys.version_info[:3]),
        corpus.content_key(documents),
        config.vocab_size,
        config.validation_share,
        given,
        tokenizers.__version__,
    )

    def build(folder: Path) -> None:
        logger.info("preparing the embedded corpus (%d files under %s), once", len(documents), library)
        parts = dict(
            zip(("train", "validation"), corpus.split_by_file(documents, config.validation_share), strict=True)
        )
        if config.tokenizer is None:
            tokenizer = train_tokenizer((document.text for document in parts["train"]), config.vocab_size)
        else:
            tokenizer = load_tokenizer(config.tokenizer)
        _check_size(tokenizer, config)
        end = end_of_text_id(tokenizer)
        for name, part in parts.items():
            with IndexedWriter(folder / name, config.vocab_size) as writer:
                for ids, _ in encode_pieces(tokenizer, ((document.text, True) for document in part), end):
                    writer.write(ids)
                    writer.end_document()
        save_tokenizer(tokenizer, folder / "tokenizer.json")

    folder = built_folder(root, f"stdlib-{key}", build)
    train, validation = (IndexedDataset(folder / name) for name in ("train", "validation"))
    return _assemble(
        config,
        root,
        _pack(train, every_document(train), config, root, seq_len, seed),
        _pack(validation, every_document(validation), config, root, seq_len, _VALIDATION_SEED),
        folder / "tokenizer.json",
        validation_samples,
    )


def _open_indexed(config: DataConfig, root: Path, seq_len: int, seed: int, validation_samples: int | None) -> Data:
    weights = list(config.weights) or [1.0] * len(config.paths)
    sources = [IndexedDataset(path) for path in config.paths]
    train: list[Dataset] = []
    validation: list[Dataset] = []
    for source in sources:
        if config.validation_paths:
            train.append(_pack(source, every_document(source), config, root, seq_len, seed))
        else:
            kept, held_out = split_documents(source, config.validation_share)
            train.append(_pack(source, kept, config, root, seq_len, seed))
            validation.append(_pack(source, held_out, config, root, seq_len, _VALIDATION_SEED))
    validation_weights: Sequence[float] = weights
    if config.validation_paths:
        held = [IndexedDataset(path) for path in config.validation_paths]
        validation = [_pack(part, every_document(part), config, root, seq_len, _VALIDATION_SEED) for part in held]
        validation_weights = [len(part) for part in validation]
    return _assemble(
        config,
        root,
        _mix(train, weights, config.document_mask),
        _mix(validation, validation_weights, config.document_mask),
        _tokenizer_beside(config),
        validation_samples,
    )


def _pack(
    source: IndexedDataset, documents: NDArray[np.int64], config: DataConfig, root: Path, seq_len: int, seed: int
) -> PackedDataset:
    checked = key_of(source.fingerprint, config.vocab_size)
    built_folder(root, f"checked-{checked}", lambda _: source.check_vocabulary(config.vocab_size))
    dataset = PackedDataset(
        source,
        documents,
        seq_len=seq_len,
        seed=seed,
        vocab_size=config.vocab_size,
        document_mask=config.document_mask,
        cache=root,
    )
    dataset.prepare()
    return dataset


def _mix(parts: list[Dataset], weights: Sequence[float], document_mask: bool) -> Dataset:
    return parts[0] if len(parts) == 1 else BlendedDataset(parts, weights, document_mask=document_mask)


def _assemble(
    config: DataConfig,
    root: Path,
    train: Dataset,
    validation: Dataset,
    tokenizer_path: Path | None,
    validation_samples: int | None,
) -> Data:
    """Adds what only a tokenizer can tell."""
    if tokenizer_path is None:
        return Data(train, validation, config.vocab_size, None, None, None)
    tokenizer = load_tokenizer(tokenizer_path)
    _check_size(tokenizer, config)
    strings = token_byte_strings(tokenizer)
    strings += [b""] * (config.vocab_size - len(strings))
    try:
        end = end_of_text_id(tokenizer)
    except DataError:
        end = None  # token files that exist say themselves where documents end
    texts = [train.fingerprint, validation.fingerprint, _file_hash(str(tokenizer_path))]
    key = key_of(_BIGRAM_FORMAT, texts, config.document_mask, validation_samples or 0)

    def build(folder: Path) -> None:
        figure = bigram_bits_per_byte(train, validation, strings, validation_samples=validation_samples)
        (folder / "bits_per_byte.json").write_text(json.dumps(figure))

    bigram = json.loads((built_folder(root, f"bigram-{key}", build) / "bits_per_byte.json").read_text())
    token_bytes = torch.tensor([len(string) for string in strings], dtype=torch.int64)
    info = TokenizerInfo(tokenizer_path, num_ids(tokenizer), end)
    return Data(train, validation, config.vocab_size, info, token_bytes, bigram)


def _check_size(tokenizer: Tokenizer, config: DataConfig) -> None:
    size = num_ids(tokenizer)
    if size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has ids up to {size - 1} and data.vocab_size is {config.vocab_size}: use {size} or more"
        )


def _file_hash(path: str) -> str:
    if not Path(path).is_file():
        raise DataError(f"{path} does not exist: a tokenizer is one tokenizer.json file")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _tokenizer_beside(config: DataConfig) -> Path | None:
    """The tokenizer of indexed data: the one configured, else the one beside the files; they must not differ."""
    if config.tokenizer is not None:
        return Path(config.tokenizer)
    beside = [Path(path + ".tokenizer.json") for path in config.paths + config.validation_paths]
    present = [path for path in beside if path.is_file()]
    for path in present[1:]:
        if _file_hash(str(path)) != _file_hash(str(present[0])):
            raise DataError(f"{present[0]} and {path} differ: data sets made by different tokenizers can't be mixed")
    return present[0] if present else None
