"""`fp8moe data PREFIX`: the card of token files: size, documents, lengths, samples of training with their mask; or of a
file of conversations (`chat_data`)."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from fp8moe.cli.chat_data import print_chat
from fp8moe.cli.command import Parser, make_parser, parse
from fp8moe.data.card import Card, card_of, histogram
from fp8moe.data.card_samples import Segment, training_samples
from fp8moe.data.chat_rows import is_chat_file
from fp8moe.data.fim import FillInTheMiddle, open_fim, sentinel_ids
from fp8moe.data.indexed import IndexedDataset
from fp8moe.data.sources import DataConfig
from fp8moe.data.token_bytes import token_byte_strings
from fp8moe.data.tokenizer import end_of_text_id, load_tokenizer, num_ids, tokenizer_beside
from fp8moe.errors import ConfigError, DataError

DESCRIPTION = """\
Print what token files hold: documents, tokens, bytes a token, lengths, duplicates, and samples as training sees them:
for each run of tokens its document, its part under fill-in-the-middle, and whether the loss predicts it. Of a file of
conversations: what is learned of them.

  fp8moe data tokens/mine --samples 3
  fp8moe data tokens/mine --packing documents --document-mask --fim-rate 1
  fp8moe data chat.jsonl --tokenizer runs/base/tokenizer.json --chat-template plain
"""


def command_parser() -> Parser:
    """The parser of the command line."""
    parser = make_parser("data", DESCRIPTION)
    parser.add_argument(
        "path", metavar="PREFIX", help="PREFIX of PREFIX.bin and PREFIX.idx, or one of these, or a chat"
    )
    parser.add_argument("--samples", type=int, default=2, metavar="N", help="samples to show (default: 2)")
    parser.add_argument(
        "--size",
        type=int,
        default=128,
        metavar="N",
        help="tokens that a sample predicts, a run's seq_len (default: 128)",
    )
    parser.add_argument("--packing", choices=("stream", "documents"), default="stream", help="as data.packing")
    parser.add_argument("--document-mask", action="store_true", help="as data.document_mask")
    parser.add_argument("--fim-rate", type=float, default=0.0, metavar="SHARE", help="as data.fim_rate (default: 0)")
    parser.add_argument(
        "--fim-tokens", nargs=3, default=(), metavar=("BEGIN", "HOLE", "END"), help="as data.fim_tokens"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of order and cuts (default: 0)")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json (default: PREFIX.tokenizer.json)")
    parser.add_argument(
        "--chat-template", metavar="NAME", help="of a chat: chatml, plain, FILE (default: the tokenizer's)"
    )
    return parser


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code (0, 2 configuration, 3 data)."""
    try:
        _run(parse(command_parser(), argv))
    except (ConfigError, DataError) as error:
        print(f"fp8moe data: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(options: argparse.Namespace) -> None:
    _check(options)
    if is_chat_file(Path(options.path)):
        print_chat(Path(options.path), options)
        return
    prefix = options.path
    if prefix.endswith((".bin", ".idx")):
        prefix = prefix[: -len(".bin")]
    source = IndexedDataset(prefix)
    path = Path(options.tokenizer) if options.tokenizer is not None else tokenizer_beside([prefix])
    vocabulary = None if path is None else _vocabulary(load_tokenizer(path))
    token_bytes = None if vocabulary is None else np.array([len(one) for one in vocabulary.strings], dtype=np.int64)
    card = card_of(source, token_bytes, None if vocabulary is None else vocabulary.end_of_text)
    vocab_size = max(card.largest_id + 1, 0 if vocabulary is None else len(vocabulary.strings))
    with tempfile.TemporaryDirectory() as cache:
        samples = training_samples(
            source,
            options.samples,
            options.size,
            packing=options.packing,
            document_mask=options.document_mask,
            seed=options.seed,
            vocab_size=vocab_size,
            fim=_fim(options, path, vocab_size),
            sentinels=_sentinels(vocabulary, options.fim_tokens),
            cache=Path(cache),
        )
    _print_figures(prefix, source, card, None if vocabulary is None else vocabulary.tokenizer)
    for number, sample in enumerate(samples):
        print(f"\nsample {number}, {sum(len(one.ids) for one in sample):,} tokens:")
        print("\n".join(_lines(sample, vocabulary)))


def _check(options: argparse.Namespace) -> None:
    if options.samples < 0:
        raise ConfigError(f"--samples {options.samples} must be at least 0: use 0 for none")
    if options.size < 1:
        raise ConfigError(f"--size {options.size} must be at least 1: use 128")
    if not 0 <= options.fim_rate <= 1:
        raise ConfigError(f"--fim-rate {options.fim_rate:g} must be at least 0 and at most 1: use 0 for none")
    if not 0 <= options.seed < 2**63:
        raise ConfigError(f"--seed {options.seed} must be at least 0 and below 2^63: use 0")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, the bytes of its ids, and the id that ends a document, where it has a known one."""

    tokenizer: Tokenizer
    strings: list[bytes]
    end_of_text: int | None


def _vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    try:
        end = end_of_text_id(tokenizer)
    except DataError:
        end = None
    return Vocabulary(tokenizer, token_byte_strings(tokenizer), end)


def _fim(options: argparse.Namespace, path: Path | None, vocab_size: int) -> FillInTheMiddle | None:
    if options.fim_rate == 0:
        return None
    if path is None:
        raise ConfigError(
            f"--fim-rate {options.fim_rate:g} needs a tokenizer and {options.path} has none beside it: use --tokenizer"
        )
    config = DataConfig(fim_rate=options.fim_rate, fim_tokens=tuple(options.fim_tokens), vocab_size=vocab_size)
    return open_fim(config, path, options.seed)


def _sentinels(vocabulary: Vocabulary | None, names: Sequence[str]) -> tuple[int, ...] | None:
    """The ids of the sentinels of fill-in-the-middle; None where none are named and the vocabulary has none."""
    if vocabulary is None:
        return None
    try:
        return sentinel_ids(vocabulary.tokenizer, names)
    except DataError:
        if names:
            raise
        return None


def _print_figures(prefix: str, source: IndexedDataset, card: Card, tokenizer: Tokenizer | None) -> None:
    print(f"{prefix}: {card.documents:,} documents, {card.tokens:,} tokens of type {source.tokens.dtype}")
    if tokenizer is None or card.num_bytes is None:
        print(
            f"no tokenizer beside it, so no bytes and no text; {card.used_ids:,} ids are used, up to {card.largest_id}"
        )
    else:
        text_tokens = max(1, card.tokens - card.documents)
        print(
            f"{card.num_bytes:,} bytes of text, {card.num_bytes / text_tokens:.3f} bytes/token, "
            f"{card.used_ids:,} of {num_ids(tokenizer):,} ids are used"
        )
        if card.largest_id >= num_ids(tokenizer):
            print(f"id {card.largest_id} is past the tokenizer's {num_ids(tokenizer)} ids: it is another tokenizer's")
    print(f"{card.empty:,} documents are empty, {card.duplicates:,} are exact duplicates of an earlier one")
    low, middle, high = (int(one) for one in np.percentile(card.lengths, [5, 50, 95]))
    print(f"tokens a document: median {middle:,}, 5 % have at most {low:,}, 5 % at least {high:,}; longest "
          f"{int(card.lengths.max()):,}")  # fmt: skip
    print("\n".join(["", f"{'tokens':>23} {'documents':>12}", *histogram(card.lengths)]))


def _lines(sample: list[Segment], vocabulary: Vocabulary | None) -> list[str]:
    """A line a segment: document and tokens of it, part, mask, how many tokens, text."""
    rows = []
    for one in sample:
        if one.document is None:
            rows.append(("padding", "", "not predicted", f"{len(one.ids):,}", ""))
            continue
        last = one.place + len(one.ids) - 1
        places = f"token {last:,}" if last == one.place else f"tokens {one.place:,}-{last:,}"
        where = f"document {one.document:,}, {places}"
        mask = "predicted" if one.predicted else "not predicted"
        rows.append((where, one.part, mask, f"{len(one.ids):,}", _text(one.ids.tolist(), vocabulary)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  ".join(
            ["", row[0].ljust(widths[0]), *([row[1].ljust(widths[1])] if widths[1] else []),
             row[2].ljust(widths[2]), row[3].rjust(widths[3]), row[4]]
        ).rstrip()
        for row in rows
    ]  # fmt: skip


def _text(ids: list[int], vocabulary: Vocabulary | None) -> str:
    """Text in quotes, special tokens by their names between; ids where there is no tokenizer."""
    if vocabulary is None:
        return " ".join(map(str, ids))
    strings, words = vocabulary.strings, []
    for is_text, group in groupby(ids, key=lambda one: one < len(strings) and strings[one] != b""):
        if is_text:
            raw = b"".join(strings[one] for one in group)
            words.append(json.dumps(raw.decode(errors="replace"), ensure_ascii=False))
        else:
            words += [vocabulary.tokenizer.id_to_token(one) or f"[id {one}]" for one in group]
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
