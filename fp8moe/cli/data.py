"""`fp8moe data PREFIX`: the card of token files: their size, documents, lengths, and samples of their text; or of a
file of conversations (`chat_data`)."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from fp8moe.cli.chat_data import print_chat
from fp8moe.cli.command import Parser, make_parser, parse
from fp8moe.data.card import Card, Sample, card_of, histogram, samples_of
from fp8moe.data.chat_rows import is_chat_file
from fp8moe.data.indexed import IndexedDataset
from fp8moe.data.token_bytes import token_byte_strings
from fp8moe.data.tokenizer import end_of_text_id, load_tokenizer, num_ids, tokenizer_beside
from fp8moe.errors import ConfigError, DataError

DESCRIPTION = """\
Print what token files hold: documents, tokens, bytes a token, lengths, duplicates, samples; of a file of conversations,
what is learned of them.

  fp8moe data tokens/mine --samples 3
  fp8moe data chat.jsonl --tokenizer runs/base/tokenizer.json --chat-template plain
"""


def command_parser() -> Parser:
    """The parser of the command line."""
    parser = make_parser("data", DESCRIPTION)
    parser.add_argument(
        "path", metavar="PREFIX", help="PREFIX of PREFIX.bin and PREFIX.idx, or one of these, or a chat"
    )
    parser.add_argument("--samples", type=int, default=2, metavar="N", help="samples of text to show (default: 2)")
    parser.add_argument("--size", type=int, default=128, metavar="N", help="tokens of a sample (default: 128)")
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
    if options.samples < 0:
        raise ConfigError(f"--samples {options.samples} must be at least 0: use 0 for none")
    if options.size < 1:
        raise ConfigError(f"--size {options.size} must be at least 1: use 128")
    if is_chat_file(Path(options.path)):
        print_chat(Path(options.path), options)
        return
    prefix = options.path
    if prefix.endswith((".bin", ".idx")):
        prefix = prefix[: -len(".bin")]
    source = IndexedDataset(prefix)
    path = Path(options.tokenizer) if options.tokenizer is not None else tokenizer_beside([prefix])
    tokenizer = None if path is None else load_tokenizer(path)
    strings = None if tokenizer is None else token_byte_strings(tokenizer)
    token_bytes = None if strings is None else np.array([len(one) for one in strings], dtype=np.int64)
    _print_figures(prefix, source, card_of(source, token_bytes, _end(tokenizer)), tokenizer)
    for sample in samples_of(source, options.samples, options.size) if options.samples else []:
        print(_shown(sample, strings))


def _end(tokenizer: Tokenizer | None) -> int | None:
    try:
        return None if tokenizer is None else end_of_text_id(tokenizer)
    except DataError:
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


def _shown(sample: Sample, strings: list[bytes] | None) -> str:
    """A sample with a line where each document begins; ids where there is no tokenizer."""
    begin = dict(sample.documents)
    places = sorted({0, *begin, len(sample.ids)})
    lines = [f"\ntokens {sample.start:,} to {sample.start + len(sample.ids) - 1:,}:"]
    for here, after in itertools.pairwise(places):
        ids = sample.ids[here:after].tolist()
        if strings is None:
            text = " ".join(map(str, ids))
        else:
            raw = b"".join(strings[one] if one < len(strings) else b"" for one in ids)
            text = json.dumps(raw.decode(errors="replace"), ensure_ascii=False)
        where = f"document {begin[here]:,} begins" if here in begin else f"within document {sample.document:,}"
        lines.append(f"  [{where}] {text}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
