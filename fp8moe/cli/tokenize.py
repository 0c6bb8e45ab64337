"""`fp8moe tokenize`: encodes text files, JSON lines and tables as a token file (PREFIX.bin, .idx, .tokenizer.json).

Text is read as a stream, so inputs may be larger than memory. Without `--tokenizer` a byte-level BPE is trained first,
on pieces taken evenly from all inputs; then the inputs are read a second time and encoded, in parallel and part by
part (`data.encode`). Finished parts, and a tokenizer trained on much text, lie in PREFIX.parts until all is written:
after a kill the same command goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from tokenizers import Tokenizer
from tqdm import tqdm

from fp8moe.cli.command import Parser, make_parser, parse
from fp8moe.data.compressed import COMPRESSED_ENDINGS
from fp8moe.data.durable import FULL, make_folder, unwritable, write_text
from fp8moe.data.encode import Encoder
from fp8moe.data.indexed import IndexedWriter, padded_vocabulary
from fp8moe.data.intake import Intake
from fp8moe.data.readers import find_files, is_inside_run, named, read_pieces
from fp8moe.data.readers_arrow import TABLE_ENDINGS
from fp8moe.data.tokenizer import end_of_text_id, load_tokenizer, num_ids, train_tokenizer
from fp8moe.errors import ConfigError, DataError, SpaceError

ENDINGS = (".bin", ".idx", ".tokenizer.json")
TRAINING_SAMPLE_BYTES = 64 << 20
RUN_SHARE = 16
_PACKED = 4  # bytes of text, about, in a byte of a compressed file
_DEFAULT_MODEL = Path(__file__).parents[1] / "configs" / "model" / "tiny.yaml"


DESCRIPTION = """\
Encode text as PREFIX.bin and PREFIX.idx (the layout of Megatron), with PREFIX.tokenizer.json.

  fp8moe tokenize --input mine.jsonl --output tokens/mine                        trains a tokenizer of 4,096 tokens
  fp8moe tokenize --input texts/ more.parquet --tokenizer tokenizer.json --output tokens/mine
"""


def command_parser() -> Parser:
    """The parser of the command line."""
    parser = make_parser("tokenize", DESCRIPTION)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="text files (one document each); .jsonl, or .json with an object a line (one document a line); these as "
        ".gz or .zst; .parquet; folders of them, of the hub's layout the train split; folders that "
        "datasets.save_to_disk or load_dataset wrote",
    )
    parser.add_argument(
        "--output", required=True, metavar="PREFIX", help="path of the files to write, without an ending"
    )
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="key or column that has the text (default: text)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json to encode with: byte-level, or as Llama 2's")
    which.add_argument(
        "--vocab-size", type=int, default=4096, metavar="N", help="vocabulary size of the BPE to train (default: 4096)"
    )
    parser.add_argument(
        "--end-of-text",
        metavar="TOKEN",
        help="token that ends a document (default: <|endoftext|> or another usual name)",
    )
    parser.add_argument("--drop-duplicates", action="store_true", help="leave out texts that came before, exactly")
    parser.add_argument("--workers", type=int, metavar="N", help="number of encoding processes (default: one a core)")
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


def _check_prefix(output: str) -> None:
    """Raise ConfigError unless `output` ends in a name, to which endings are added."""
    name = output.rpartition("/")[2]
    if name in ("", ".", ".."):
        raise ConfigError(f"--output={output} is a folder and must be a PREFIX: use {os.path.join(output, 'text')}")
    if name.endswith(ENDINGS):
        ending = next(one for one in ENDINGS if name.endswith(one))
        raise ConfigError(f"--output={output} is a PREFIX, to which {ending} is added: use {output[: -len(ending)]}")
    above = next((one for one in Path(output).parents if os.path.lexists(one)), Path())
    if not above.is_dir():
        raise ConfigError(f"--output={output} is below {above}, which is no folder: use another --output")


def _run(options: argparse.Namespace) -> None:
    _check_prefix(options.output)
    workers = _workers(options.workers)
    taken = [options.output + ending for ending in ENDINGS if os.path.lexists(options.output + ending)]
    if taken and not options.force:
        raise ConfigError(f"{taken[0]} exists and would be replaced: use another --output or add --force")
    found = find_files(options.input)
    for split in found.splits:
        print(split.described(), flush=True)
    parts = Path(f"{options.output}.parts")
    with _output_folder(options.output), _only_writer(parts):  # a place that can't be written is known first
        tokenizer = _tokenizer(options, found.files, parts)
        end = end_of_text_id(tokenizer, options.end_of_text)
        intake = Intake(found.files, options.text_key, options.drop_duplicates)
        encoder = Encoder(tokenizer, end, workers, parts)
        begun = time.monotonic()
        documents, tokens, num_bytes = _encode(found.files, options.output, tokenizer, intake, encoder)
        shutil.rmtree(parts, ignore_errors=True)
    seconds = time.monotonic() - begun
    print(
        f"{options.output}.bin: {documents} documents from {len(found.files)} files, {tokens} tokens, "
        f"{num_bytes / (tokens - documents):.3f} bytes/token, vocabulary {num_ids(tokenizer)}"
    )
    print(f"{num_bytes / 1e6:.1f} MB of text in {seconds:.1f} s: {num_bytes / 1e6 / seconds:.2f} MB/s", end="")
    print(f", {encoder.reused} parts were encoded before" if encoder.reused else "")
    if intake.empty or options.drop_duplicates:
        dropped = f", {intake.duplicates} exact duplicates" if options.drop_duplicates else ""
        print(f"left out: {intake.empty} empty documents{dropped}")
    if found.passed_over:
        print(f"passed over {named(found.passed_over)}")
    print(f"next: {next_command(options.output, num_ids(tokenizer))}")


def next_command(prefix: str, size: int) -> str:
    """The command that trains on token files of `size` ids."""
    plain = re.fullmatch(r"[\w./-]+", prefix)
    path = prefix if plain else '"' + prefix.replace("\\", "\\\\").replace('"', '\\"') + '"'
    words = ["fp8moe", "train", "--nproc", "auto", "experiment=quickstart", "data.source=indexed"]
    words.append(f"data.paths=[{path}]")
    if size > yaml.safe_load(_DEFAULT_MODEL.read_text(encoding="utf-8"))["vocab_size"]:
        words.append(f"model.vocab_size={padded_vocabulary(size)}")
    return " ".join(word if re.fullmatch(r"[\w./=\[\]-]+", word) else shlex.quote(word) for word in words)


def _workers(workers: int | None) -> int:
    if workers is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers < 1:
        raise ConfigError(f"--workers {workers} must be at least 1")
    return workers


def _tokenizer(options: argparse.Namespace, files: list[Path], parts: Path) -> Tokenizer:
    """The one given, or one trained on the files; kept in `parts` where a killed run left that."""
    if options.tokenizer is not None:
        return load_tokenizer(options.tokenizer)
    status = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = json.dumps([status, options.text_key, options.vocab_size])
    kept = parts / f"tokenizer-{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"
    if kept.is_file():
        return load_tokenizer(kept)
    tokenizer = train_tokenizer(_training_sample(files, options.text_key), options.vocab_size)
    if sum(map(_text_bytes, files)) > TRAINING_SAMPLE_BYTES:  # otherwise it is quickly trained again
        try:
            make_folder(parts)
            write_text(kept, tokenizer.to_str())
        except OSError as error:
            raise unwritable(parts, error, _advice(parts)) from error
    return tokenizer


@contextlib.contextmanager
def _output_folder(prefix: str) -> Iterator[None]:
    """Make the folder of the output; it goes again if the block fails, and an error of its disk is one sentence."""
    folder, made = Path(prefix).absolute().parent, []
    try:
        made = make_folder(folder)
        yield
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in FULL:
            shutil.rmtree(f"{prefix}.parts", ignore_errors=True)
        for one in made:
            with contextlib.suppress(OSError):
                one.rmdir()
        if isinstance(error, OSError):
            raise unwritable(error.filename or prefix, error, _advice(folder)) from error
        raise


@contextlib.contextmanager
def _only_writer(parts: Path) -> Iterator[None]:
    """Hold the folder of the output locked for these token files; remove what killed runs left of unfinished ones.

    Raises OSError, naming the output, where it can't be written.
    """
    prefix = parts.with_suffix("")
    lock = prefix.with_name(f".{prefix.name}.lock")
    try:
        opened = open(lock, "ab")  # noqa: SIM115  closed below
    except OSError as error:
        error.filename = str(prefix)
        raise
    with opened as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another fp8moe tokenize writes {prefix}: wait for it, or use another --output"
            ) from None
        except OSError:  # a file system without locks
            pass
        try:
            for ending in ENDINGS:
                for left in lock.parent.glob(f".{prefix.name}{ending}.*"):
                    left.unlink(missing_ok=True)
            yield
        finally:
            lock.unlink(missing_ok=True)


def _advice(folder: Path) -> str:
    existing = next(one for one in (folder, *folder.parents) if one.is_dir())
    free = shutil.disk_usage(existing).free / 1e9
    return f"nothing was written, {free:.2f} GB are free there; use another --output"


def _is_packed(file: Path) -> bool:
    return file.suffix.lower() in COMPRESSED_ENDINGS + TABLE_ENDINGS


def _text_bytes(file: Path) -> int:
    return file.stat().st_size * (_PACKED if _is_packed(file) else 1)


def _training_sample(files: list[Path], text_key: str) -> Iterator[str]:
    """Every n-th piece of the input, with n chosen so that the pieces have about TRAINING_SAMPLE_BYTES in all.

    Of the pieces of a long run without white space every RUN_SHARE-th: a merge is counted in each piece that has the
    pair, and pieces of thousands of characters have nearly all pairs.
    """
    every = 1 + sum(map(_text_bytes, files)) // TRAINING_SAMPLE_BYTES
    pieces = _thinned(text for file in files for text, _ in read_pieces(file, text_key))
    return (text for number, text in enumerate(pieces) if number % every == 0)


def _thinned(pieces: Iterable[str]) -> Iterator[str]:
    inside = 0
    for piece in pieces:
        inside = inside + 1 if is_inside_run(piece) else 0
        if inside % RUN_SHARE in (0, 1):  # 0: not inside a run
            yield piece


def _encode(
    files: list[Path], prefix: str, tokenizer: Tokenizer, intake: Intake, encoder: Encoder
) -> tuple[int, int, int]:
    """Writes the three files and returns (documents, tokens including end-of-text, bytes of text)."""
    num_bytes = document_bytes = 0
    total = None if any(map(_is_packed, files)) else sum(file.stat().st_size for file in files)
    # disable=None shows the bar only when standard error is a terminal.
    with (
        tqdm(total=total, unit="B", unit_scale=True, disable=None, desc="encode") as bar,
        IndexedWriter(prefix, num_ids(tokenizer)) as writer,
    ):
        for part in encoder.encode(intake.pieces()):
            for ids, size, ends in part.pieces():
                writer.write(ids)
                document_bytes += size
                if ends:
                    is_dropped = intake.is_dropped()
                    writer.drop_document() if is_dropped else writer.end_document()
                    num_bytes += 0 if is_dropped else document_bytes
                    document_bytes = 0
            bar.update(int(part.sizes.sum()))
        if writer.num_documents == 0:
            raise DataError(
                f"the {len(files)} input files have 0 documents with text: nothing was written, give files with text"
            )
        writer.add(".tokenizer.json", tokenizer.to_str(pretty=True))
    return writer.num_documents, writer.num_tokens, num_bytes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
