"""Builds the data sets of a run from a `DataConfig`: `open_data` is the only function that training calls.

One process of a job prepares the data while the others wait at the caller's barrier and then find them in the cache; a
process on a node without that cache prepares them itself. Prepared folders, each named by a hash of all its inputs:
- `stdlib-*`: tokenizer, training and validation token files of the embedded corpus (about 4 s on two cores);
- `chat-*`: token files and mask of a file of conversations (`chat_tokens`);
- `checked-*`: empty; it exists once every id of a token file was checked against the vocabulary size;
- `order-*`: the sample order of one epoch; `bigram-*`: the figure of the byte bigram model.

The validation order always uses seed 0 and the plain stream, so its first K samples are the same text in every run:
packing by documents and fill-in-the-middle concern training alone, and figures of runs with and without compare.
Conversations are packed in both parts alike, since a stream would cut their answers from what was asked.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import torch
from numpy.typing import NDArray
from torch import Tensor

from fp8moe.data import sources
from fp8moe.data.bigram import bigram_bits_per_byte
from fp8moe.data.cache import built_folder, cache_root, key_of, read_number
from fp8moe.data.chat_template import ChatTemplate, open_chat_tools
from fp8moe.data.chat_tokens import open_chat_tokens
from fp8moe.data.fim import FillInTheMiddle, open_fim
from fp8moe.data.indexed import IndexedDataset, IndexedWriter
from fp8moe.data.packing import Dataset, PackedDataset, every_document
from fp8moe.data.sampler import BlendedDataset
from fp8moe.data.sources import DataConfig
from fp8moe.data.split import split, split_documents
from fp8moe.data.tokenizer import (
    TokenizerInfo,
    check_size,
    encode_pieces,
    end_of_text_id,
    file_hash,
    load_tokenizer,
    num_ids,
    save_tokenizer,
    tokenizer_beside,
    train_tokenizer,
)
from fp8moe.data.vocabulary import load_vocabulary
from fp8moe.errors import ConfigError

logger = logging.getLogger(__name__)

_STDLIB_FORMAT = 1
_BIGRAM_FORMAT = 1
_VALIDATION_SEED = 0


@dataclass(frozen=True)
class Data:
    """The opened data sets and the figures that training takes from them.

    token_bytes: int64 [vocab_size], number of bytes of each id, 0 for special tokens and unused ids; None without a
        tokenizer. Bits per byte = sum of nats over predicted tokens / ln 2 / sum of token_bytes over their labels.
    bigram_bits_per_byte: of a byte bigram model on the same validation text; None without a tokenizer, and for chat.
    chat: the template of conversations; None for text.
    """

    train: Dataset
    validation: Dataset
    vocab_size: int
    tokenizer: TokenizerInfo | None
    token_bytes: Tensor | None
    bigram_bits_per_byte: float | None
    chat: ChatTemplate | None = None


def open_data(
    config: DataConfig,
    *,
    seq_len: int,
    seed: int,
    is_first: bool = True,
    barrier: Callable[[], None] = lambda: None,
    validation_samples: int | None = None,
) -> Data:
    """Opens the data, and prepares them first when they are not in the cache.

    seq_len: tokens a sample predicts. seed: of the training order, the same as the `Sampler`'s.
    is_first: True in exactly one process of a job, which prepares the data while the others wait in `barrier`.
    validation_samples: number of validation samples the bigram model is measured on; None: one epoch.
    Raises ConfigError and DataError.
    """
    if not is_first:
        barrier()
    root = cache_root(config.cache_dir)
    if config.source == "stdlib":
        data = _open_stdlib(config, root, seq_len, seed, validation_samples)
    elif config.source == "chat":
        data = _open_chat(config, root, seq_len, seed)
    elif config.source == "problems":
        raise ConfigError("data.source=problems is what fp8moe grpo learns from: use fp8moe grpo, or another data")
    else:
        data = _open_indexed(config, root, seq_len, seed, validation_samples)
    if is_first:
        barrier()
    return data


def _open_stdlib(config: DataConfig, root: Path, seq_len: int, seed: int, validation_samples: int | None) -> Data:
    library = sources.standard_library_root()
    documents = sources.read_corpus(library)
    given = "trained" if config.tokenizer is None else file_hash(config.tokenizer)
    key = key_of(
        _STDLIB_FORMAT,
        list(sys.version_info[:3]),
        sources.content_key(documents),
        config.vocab_size,
        config.validation_share,
        given,
        tokenizers.__version__,
    )

    def build(folder: Path) -> None:
        logger.info(
            "tokenizing the embedded corpus (%d files under %s); later runs read it from the cache",
            len(documents),
            library,
        )
        parts = dict(
            zip(("train", "validation"), sources.split_by_file(documents, config.validation_share), strict=True)
        )
        if config.tokenizer is None:
            tokenizer = train_tokenizer((document.text for document in parts["train"]), config.vocab_size)
        else:
            tokenizer = load_tokenizer(config.tokenizer)
        check_size(tokenizer, config.vocab_size)
        end = end_of_text_id(tokenizer)
        for name, part in parts.items():
            with IndexedWriter(folder / name, config.vocab_size) as writer:
                for ids, _ in encode_pieces(tokenizer, ((document.text, True) for document in part), end):
                    writer.write(ids)
                    writer.end_document()
        save_tokenizer(tokenizer, folder / "tokenizer.json")

    folder = built_folder(root, f"stdlib-{key}", build)
    train, validation = (IndexedDataset(folder / name) for name in ("train", "validation"))
    fim = open_fim(config, folder / "tokenizer.json", seed)
    return _assemble(
        config,
        root,
        _pack(train, every_document(train), config, root, seq_len, seed, config.packing, fim),
        _pack(validation, every_document(validation), config, root, seq_len, _VALIDATION_SEED),
        folder / "tokenizer.json",
        validation_samples,
    )


def _open_indexed(config: DataConfig, root: Path, seq_len: int, seed: int, validation_samples: int | None) -> Data:
    weights = list(config.weights) or [1.0] * len(config.paths)
    if config.tokenizer is not None:
        tokenizer: Path | None = Path(config.tokenizer)
    else:
        tokenizer = tokenizer_beside(config.paths + config.validation_paths)
    train: list[Dataset] = []
    validation: list[Dataset] = []
    opened = [IndexedDataset(path) for path in config.paths]  # a missing file is found before any is read
    fim = open_fim(config, tokenizer, seed)
    for source in opened:
        if config.validation_paths:
            train.append(_pack(source, every_document(source), config, root, seq_len, seed, config.packing, fim))
        else:
            parts, kept, held_out = split(source, config.validation_share, seq_len)
            train.append(_pack(parts, kept, config, root, seq_len, seed, config.packing, fim))
            validation.append(_pack(parts, held_out, config, root, seq_len, _VALIDATION_SEED))
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
        tokenizer,
        validation_samples,
    )


def _open_chat(config: DataConfig, root: Path, seq_len: int, seed: int) -> Data:
    path, tokenizer, template = open_chat_tools(config)
    open_tokens = partial(
        open_chat_tokens,
        template=template,
        tokenizer=tokenizer,
        vocab_size=config.vocab_size,
        seq_len=seq_len,
        drops=config.long_conversations == "drop",
        cache=root,
    )
    opened = [open_tokens(Path(name)) for name in config.paths]
    held = [open_tokens(Path(name)) for name in config.validation_paths]
    parts = [(one, every_document(one)) for one in held]
    train: list[Dataset] = []
    for one in opened:
        kept, held_out = (every_document(one), None) if held else split_documents(one, config.validation_share)
        train.append(_pack(one, kept, config, root, seq_len, seed, config.packing))
        parts += [] if held_out is None else [(one, held_out)]
    validation: list[Dataset] = [
        _pack(one, numbers, config, root, seq_len, _VALIDATION_SEED, config.packing) for one, numbers in parts
    ]
    weights = list(config.weights) or [1.0] * len(train)
    vocabulary = load_vocabulary(path, config.vocab_size)
    return Data(
        _mix(train, weights, config.document_mask),
        _mix(validation, [len(part) for part in validation] if held else weights, config.document_mask),
        config.vocab_size,
        TokenizerInfo(path, num_ids(tokenizer), vocabulary.end_of_text),
        torch.tensor([len(string) for string in vocabulary.strings], dtype=torch.int64),
        None,
        template,
    )


def _pack(
    source: IndexedDataset,
    documents: NDArray[Any],
    config: DataConfig,
    root: Path,
    seq_len: int,
    seed: int,
    packing: str = "stream",
    fim: FillInTheMiddle | None = None,
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
        packing=packing,
        fim=fim,
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
    """Adds the figures that need a tokenizer."""
    if tokenizer_path is None:
        return Data(train, validation, config.vocab_size, None, None, None)
    vocabulary = load_vocabulary(tokenizer_path, config.vocab_size)
    strings = vocabulary.strings
    texts = [train.fingerprint, validation.fingerprint, file_hash(tokenizer_path)]
    key = key_of(_BIGRAM_FORMAT, texts, config.document_mask, validation_samples or 0)

    def build(folder: Path) -> None:
        figure = bigram_bits_per_byte(train, validation, strings, validation_samples=validation_samples)
        (folder / "bits_per_byte.json").write_text(json.dumps(figure))

    bigram = read_number(built_folder(root, f"bigram-{key}", build) / "bits_per_byte.json")
    token_bytes = torch.tensor([len(string) for string in strings], dtype=torch.int64)
    info = TokenizerInfo(tokenizer_path, num_ids(vocabulary.tokenizer), vocabulary.end_of_text)
    return Data(train, validation, config.vocab_size, info, token_bytes, bigram)
