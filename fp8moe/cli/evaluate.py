"""`fp8moe eval`: bits per byte and perplexity of text and token files, accuracy of multiple choice."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8moe.cli.command import Parser, check_file, make_parser, parse
from fp8moe.cli.launch import count_processes, is_worker, run_command
from fp8moe.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fp8moe.cli.trained import Trained
    from fp8moe.generate.scoring import Question
    from fp8moe.generate.text import Vocabulary
    from fp8moe.model.transformer import Transformer
    from fp8moe.parallel.mesh import Mesh

DESCRIPTION = """\
Score text, token files and multiple choice with a trained model. Each may be given several times.

  fp8moe eval runs/mine --text book.txt
  fp8moe eval runs/mine --tokens data/held_out          data/held_out.bin and .idx, of fp8moe tokenize
  fp8moe eval runs/mine --choices quiz.jsonl            {"question": ..., "choices": [...], "answer": 0} a line
  fp8moe eval runs/mine --text book.txt --json scores.json --nproc 2 parallel.ep=2
"""
CHOICE_KEYS: dict[str, type | tuple[type, ...]] = {"question": str, "choices": list, "answer": (int, str)}


@dataclass(frozen=True)
class Stream:
    """A file's tokens, and where its documents begin."""

    path: str
    tokens: NDArray[np.int64]
    starts: NDArray[np.int64]


def command_parser() -> Parser:
    """The parser of the command line."""
    from fp8moe.cli.trained import add_arguments

    parser = make_parser("eval", DESCRIPTION)
    add_arguments(parser)
    parser.add_argument("--text", action="append", default=[], metavar="PATH", help="a text file in UTF-8")
    parser.add_argument("--tokens", action="append", default=[], metavar="PREFIX", help="a token file, without .bin")
    parser.add_argument("--choices", action="append", default=[], metavar="PATH", help="JSON lines of questions")
    parser.add_argument("--seq-len", type=int, metavar="N", help="tokens a window predicts (the run's seq_len)")
    parser.add_argument("--limit", type=int, metavar="N", help="tokens of a file, or questions, that are scored")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="sequences of a forward, on a rank (8)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the scores here")
    return parser


def main(argv: Sequence[str]) -> int:
    """The command `fp8moe eval`."""
    arguments = parse(command_parser(), argv)
    if not is_worker():
        _check(arguments, 1 if arguments.nproc is None else count_processes(arguments.nproc))
    return run_command("eval", argv, arguments.nproc, lambda processes: _evaluate(arguments, processes))


def _check(arguments: argparse.Namespace, processes: int) -> None:
    """What can be known before a process starts. Raises with one sentence."""
    from fp8moe.cli.trained import find_trained

    if not (arguments.text or arguments.tokens or arguments.choices):
        raise ConfigError("nothing to score: add --text PATH, --tokens PREFIX or --choices PATH")
    for name in ("seq_len", "limit", "batch"):
        value = getattr(arguments, name)
        if value is not None and value < (2 if name == "limit" else 1):
            least = 2 if name == "limit" else 1
            raise ConfigError(f"--{name.replace('_', '-')}={value} must be at least {least}: use {least} or more")
    if arguments.json is not None:
        check_file("--json", arguments.json, "scores.json")
    trained = find_trained(arguments, processes)
    longest = trained.config.model.max_seq_len
    if arguments.seq_len is not None and arguments.seq_len > longest:
        raise ConfigError(f"--seq-len={arguments.seq_len} exceeds model.max_seq_len={longest}: use at most {longest}")
    if arguments.text or arguments.choices:
        vocabulary = trained.vocabulary()
        for path in arguments.choices:
            _questions(path, arguments.limit)
        for path in arguments.text:
            _text(path, vocabulary, 2)


def _evaluate(arguments: argparse.Namespace, processes: int) -> None:
    """One rank's part of the command."""
    from fp8moe.cli.trained import find_trained
    from fp8moe.data.tokenizer import check_beside

    trained = find_trained(arguments, processes)
    vocabulary = trained.vocabulary() if trained.tokenizer.is_file() or not arguments.tokens else None
    if vocabulary is not None:
        check_beside(trained.tokenizer, arguments.tokens)
    scores: list[dict[str, Any]] = []
    with trained.loaded(averaged=arguments.ema) as (model, mesh, _):
        for stream in _streams(arguments, vocabulary):
            scores.append(_score_stream(stream, arguments, trained, vocabulary, model, mesh))
            _print(scores[-1], mesh)
        for path in arguments.choices:
            assert vocabulary is not None
            scores.append(_score_choices(path, arguments, vocabulary, model, mesh))
            _print(scores[-1], mesh)
        if mesh.rank == 0 and arguments.json is not None:
            arguments.json.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


def _streams(arguments: argparse.Namespace, vocabulary: Vocabulary | None) -> list[Stream]:
    found = []
    for path in arguments.text:
        assert vocabulary is not None
        found.append(_text(path, vocabulary, arguments.limit))
    return found + [_token_file(prefix, arguments.limit) for prefix in arguments.tokens]


def _text(path: str, vocabulary: Vocabulary, limit: int | None) -> Stream:
    import numpy as np

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise DataError(f"{path} can't be read ({reason}): name a text file") from error
    front = [] if vocabulary.end_of_text is None else [vocabulary.end_of_text]
    tokens = np.array([*front, *vocabulary.encode(text)][:limit], dtype=np.int64)
    if len(tokens) < 2:
        raise DataError(f"{path} has {len(text)} characters, which predict nothing: give a text of a few words")
    return Stream(path, tokens, np.zeros(1, dtype=np.int64))


def _token_file(prefix: str, limit: int | None) -> Stream:
    import numpy as np

    from fp8moe.data.indexed import IndexedDataset

    source = IndexedDataset(prefix)
    tokens = np.asarray(source.tokens[:limit], dtype=np.int64)
    return Stream(prefix, tokens, np.asarray(source.document_offsets[:-1], dtype=np.int64))


def _score_stream(
    stream: Stream,
    arguments: argparse.Namespace,
    trained: Trained,
    vocabulary: Vocabulary | None,
    model: Transformer,
    mesh: Mesh,
) -> dict[str, Any]:
    from fp8moe.generate.scoring import score_text

    config = trained.config
    largest = int(stream.tokens.max(initial=0))
    known = config.model.vocab_size if vocabulary is None else vocabulary.num_ids
    if largest >= known:
        raise DataError(f"{stream.path} has the id {largest} and the vocabulary {known} ids: use its own tokenizer")
    score = score_text(
        model,
        stream.tokens,
        stream.starts,
        mesh,
        seq_len=arguments.seq_len or config.seq_len,
        batch=arguments.batch,
        document_mask=config.data.document_mask,
        strings=None if vocabulary is None else vocabulary.strings,
    )
    figures = {"tokens": score.tokens, "bytes": score.num_bytes, "nats_a_token": score.nats / score.tokens}
    return {"file": stream.path, **figures, "perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}


def _questions(path: str, limit: int | None) -> list[Question]:
    from fp8moe.generate.scoring import read_questions
    from fp8moe.generate.text import json_lines

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise DataError(f"{path} can't be read ({reason}): name a file of JSON lines") from error
    return read_questions(path, json_lines(path, text, CHOICE_KEYS))[:limit]


def _score_choices(
    path: str, arguments: argparse.Namespace, vocabulary: Vocabulary, model: Transformer, mesh: Mesh
) -> dict[str, Any]:
    from fp8moe.generate.scoring import score_choices

    questions = _questions(path, arguments.limit)
    score = score_choices(model, vocabulary, questions, mesh, batch=arguments.batch)
    even = sum(1 / len(one.choices) for one in questions) / len(questions)
    figures = {"accuracy": score.accuracy, "accuracy_a_byte": score.normalised, "accuracy_of_chance": even}
    return {"file": path, "questions": len(questions), **figures, "log_likelihoods": score.log_likelihoods}


def _print(score: dict[str, Any], mesh: Mesh) -> None:
    if mesh.rank:
        return
    if "questions" in score:
        text = (
            f"accuracy {score['accuracy']:.1%}, by likelihood a byte {score['accuracy_a_byte']:.1%}, by chance "
            f"{score['accuracy_of_chance']:.1%}; {score['questions']:,} questions"
        )
    else:
        bits = score["bits_per_byte"]
        a_byte = "" if bits is None else f"{bits:.4f} bits per byte, "
        text = (
            f"{a_byte}perplexity {score['perplexity']:.3f}, {score['nats_a_token']:.4f} nats a token; "
            f"{score['tokens']:,} tokens, {score['bytes']:,} bytes"
        )
    print(f"{score['file']}: {text}", flush=True)
