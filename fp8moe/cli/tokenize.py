"""`fp8moe tokenize`: encodes text files or JSON lines as a token file (`PREFIX.bin`, `.idx`, `.tokenizer.json`).

Text is read as a stream, so inputs may be larger than memory. Without `--tokenizer` a byte-level BPE is trained first,
on pieces taken evenly from all inputs; then the inputs are read a second time and encoded.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer
from tqdm import tqdm

from fp8moe.cli.command import Parser, make_parser, parse
from fp8moe.data.durable import make_folder, unwritable
from fp8moe.data.indexed import IndexedWriter
from fp8moe.data.sources import find_files, is_inside_run, read_pieces
from fp8moe.data.tokenizer import (
    encode_pieces,
    end_of_text_id,
    load_tokenizer,
    num_ids,
    train_tokenizer,
)
from fp8moe.errors import ConfigError, DataError, SpaceError

ENDINGS = (".bin", ".idx", ".tokenizer.json")
TRAINING_SAMPLE_BYTES = 64 << 20
RUN_SHARE = 16


def command_parser() -> Parser:
    """The parser of the command line."""
    parser = make_parser(
        "tokenize",
        "Encode text as PREFIX.bin and PREFIX.idx (the layout of Megatron), with PREFIX.tokenizer.json.",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="text files (one document each), .jsonl files (one document a line), or folders of .txt, .md and .jsonl",
    )
    parser.add_argument(
        "--output", required=True, metavar="PREFIX", help="path of the files to write, without an ending"
    )
    parser.add_argument(
        "--json-key", default="text", metavar="KEY", help="key of the text in a JSON line (default: text)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tokenizer", metavar="FILE", help="byte-level tokenizer.json to encode with")
    which.add_argument(
        "--vocab-size", type=int, default=4096, metavar="N", help="vocabulary size of the BPE to train (default: 4096)"
    )
    parser.add_argument(
        "--end-of-text",
        metavar="TOKEN",
        help="token that ends a document (default: <|endoftext|> or another usual name)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="number of encoding threads (default: one a core)")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    return parser


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code (0, 2 configuration, 3 data, 7 no space)."""
    try:
        options = parse(command_parser(), argv)
        _run(options)
    except (ConfigError, DataError, SpaceError) as error:
        print(f"fp8moe tokenize: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(options: argparse.Namespace) -> None:
    _set_workers(options.workers)
    taken = [options.output + ending for ending in ENDINGS if os.path.lexists(options.output + ending)]
    if taken and not options.force:
        raise ConfigError(f"{taken[0]} exists and would be replaced: use another --output or add --force")
    files = find_files(options.input)
    if options.tokenizer is not None:
        tokenizer = load_tokenizer(options.tokenizer)
    else:
        tokenizer = train_tokenizer(_training_sample(files, options.json_key), options.vocab_size)
    end = end_of_text_id(tokenizer, options.end_of_text)
    with _output_folder(options.output):
        documents, tokens, num_bytes = _encode(files, options, tokenizer, end)
    print(
        f"{options.output}.bin: {documents} documents from {len(files)} files, {tokens} tokens, "
        f"{num_bytes / (tokens - documents):.3f} bytes/token, vocabulary {num_ids(tokenizer)}"
    )


@contextlib.contextmanager
def _output_folder(prefix: str) -> Iterator[None]:
    """Make the folder of the output; it goes again if the block fails, and an error of its disk is one sentence."""
    folder, made = Path(prefix).absolute().parent, []
    try:
        made = make_folder(folder)
        yield
    except BaseException as error:
        for one in made:
            with contextlib.suppress(OSError):
                one.rmdir()
        if isinstance(error, OSError):
            raise unwritable(error.filename or prefix, error, _advice(folder)) from error
        raise


def _advice(folder: Path) -> str:
    existing = next(one for one in (folder, *folder.parents) if one.is_dir())
    free = shutil.disk_usage(existing).free / 1e9
    return f"nothing was written, {free:.2f} GB are free there; use another --output"


def _set_workers(workers: int | None) -> None:
    if workers is None:
        return
    if workers < 1:
        raise ConfigError(f"--workers {workers} must be at least 1")
    # The thread pool of the tokenizers library reads these when it is first used.
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"


def _training_sample(files: list[Path], json_key: str) -> Iterator[str]:
    """Every n-th piece of the input, with n chosen so that the pieces have about TRAINING_SAMPLE_BYTES in all.

    Of the pieces of a long run without white space every RUN_SHARE-th: a merge is counted in each piece that has the
    pair, and pieces of thousands of characters have nearly all pairs.
    """
    every = 1 + sum(file.stat().st_size for file in files) // TRAINING_SAMPLE_BYTES
    pieces = _thinned(text for file in files for text, _ in read_pieces(file, json_key))
    return (text for number, text in enumerate(pieces) if number % every == 0)


def _thinned(pieces: Iterable[str]) -> Iterator[str]:
    inside = 0
    for piece in pieces:
        inside = inside + 1 if is_inside_run(piece) else 0
        if inside % RUN_SHARE in (0, 1):  # 0: not inside a run
            yield piece


def _encode(files: list[Path], options: argparse.Namespace, tokenizer: Tokenizer, end: int) -> tuple[int, int, int]:
    """Writes the three files and returns (documents, tokens including end-of-text, bytes of text)."""
    num_bytes = 0
    total = sum(file.stat().st_size for file in files)

    def pieces() -> Iterator[tuple[str, bool]]:
        nonlocal num_bytes
        for file in files:
            for text, ends in read_pieces(file, options.json_key):
                size = len(text.encode())
                num_bytes += size
                bar.update(size)
                yield text, ends

    # disable=None shows the bar only when standard error is a terminal.
    with (
        tqdm(total=total, unit="B", unit_scale=True, disable=None, desc="encode") as bar,
        IndexedWriter(options.output, num_ids(tokenizer)) as writer,
    ):
        for ids, ends in encode_pieces(tokenizer, pieces(), end):
            writer.write(ids)
            if ends:
                writer.end_document()
        if writer.num_documents == 0:
            raise DataError(
                f"the {len(files)} input files have 0 documents with text: nothing was written, give files with text"
            )
        writer.add(".tokenizer.json", tokenizer.to_str(pretty=True))
    return writer.num_documents, writer.num_tokens, num_bytes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
