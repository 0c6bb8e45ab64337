"""`fp8moe generate`: a trained model continues prompts or answers a chat.

Text goes to stdout as it comes, figures to stderr. Of several prompts one is shown at a time, in their order, while all
go on together.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fp8moe.cli.command import Parser, add_graphs, check_file, make_parser, parse
from fp8moe.cli.launch import count_processes, is_worker, run_command
from fp8moe.errors import ConfigError

if TYPE_CHECKING:
    from fp8moe.cli.trained import Trained
    from fp8moe.data.chat_template import ChatTemplate
    from fp8moe.generate.decode import Completion, Figures, GenerationConfig
    from fp8moe.generate.text import TextStream, Vocabulary

DESCRIPTION = """\
Continue prompts, or answer a chat, with a trained model. Greedy unless a temperature is given.

  fp8moe generate runs/mine --prompt "def read("
  fp8moe generate runs/mine --file notes.txt --temperature 0.8 --top-p 0.95 --seed 1 --max-tokens 200
  fp8moe generate runs/mine --prompt A --prompt B --stop "\\n\\n" --json out.json
  fp8moe generate runs/mine --chat messages.json         a list of {"role": ..., "content": ...}; -: lines of stdin
  fp8moe generate runs/mine --prompt A --mtp             speculative decoding with the MTP module: the same text
  fp8moe generate runs/mine --prompt A --nproc 2 parallel.ep=2 precision=bf16
"""


def command_parser() -> Parser:
    """The parser of the command line."""
    from fp8moe.cli.trained import add_arguments

    parser = make_parser("generate", DESCRIPTION)
    add_arguments(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    parser.add_argument(
        "--file",
        action="append",
        default=[],
        metavar="PATH",
        help="a text that is a prompt, or a .jsonl with a key prompt",
    )
    parser.add_argument("--chat", metavar="PATH", help="messages in JSON; - takes lines of stdin, turn by turn")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="tokens of a completion (128)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="share of the probability kept (1.0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="text that ends a completion")
    parser.add_argument("--stop-token", action="append", default=[], metavar="TOKEN", help="a special token that does")
    parser.add_argument("--ignore-end", action="store_true", help="go on behind the end-of-text token")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="prompts that go on together (32)")
    parser.add_argument("--mtp", action="store_true", help="speculative decoding with the MTP module")
    add_graphs(parser)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write prompts, completions and figures here")
    return parser


def main(argv: Sequence[str]) -> int:
    """The command `fp8moe generate`."""
    arguments = parse(command_parser(), argv)
    if not is_worker():
        _check(arguments, 1 if arguments.nproc is None else count_processes(arguments.nproc))
    return run_command("generate", argv, arguments.nproc, lambda processes: _generate(arguments, processes))


def _check(arguments: argparse.Namespace, processes: int) -> None:
    """What can be known before a process starts. Raises with one sentence."""
    from fp8moe.cli.trained import find_trained

    _ways(arguments)
    if arguments.chat == "-" and processes > 1:
        raise ConfigError(f"--chat - reads stdin, which {processes} processes can't share: use one process or a file")
    if arguments.json is not None:
        check_file("--json", arguments.json, "completions.json")
    _config(arguments)
    trained = find_trained(arguments, processes)
    trained.check_graphs(arguments)
    _ends(arguments, trained, trained.vocabulary())


def _ways(arguments: argparse.Namespace) -> None:
    texts = bool(arguments.prompt or arguments.file)
    if not texts and arguments.chat is None:
        raise ConfigError("there is nothing to continue: add --prompt TEXT, --file PATH or --chat PATH")
    if texts and arguments.chat is not None:
        raise ConfigError("--chat can't stand beside --prompt or --file: use one of them")


def _config(arguments: argparse.Namespace) -> GenerationConfig:
    from fp8moe.generate.decode import GenerationConfig
    from fp8moe.generate.sampling import SamplingConfig

    sampling = SamplingConfig(arguments.temperature, arguments.top_p, arguments.seed)
    return GenerationConfig(arguments.max_tokens, arguments.batch, arguments.mtp, sampling=sampling)


def _template(trained: Trained, vocabulary: Vocabulary) -> ChatTemplate:
    from fp8moe.data.chat_template import open_template

    return open_template(None, trained.tokenizer, vocabulary.tokenizer)


def _ends(arguments: argparse.Namespace, trained: Trained, vocabulary: Vocabulary) -> frozenset[int]:
    """The tokens that end a completion: of a chat, that which ends a turn as well."""
    from fp8moe.data.chat_tokens import end_of_turn
    from fp8moe.generate.text import check_stops

    check_stops(arguments.stop)
    own = frozenset() if arguments.ignore_end else vocabulary.ends
    if arguments.chat is not None and not arguments.ignore_end:
        of_turn = end_of_turn(_template(trained, vocabulary), vocabulary.tokenizer)
        own = own if of_turn is None else own | {of_turn}
    return own | {vocabulary.token(name) for name in arguments.stop_token}


def _generate(arguments: argparse.Namespace, processes: int) -> None:
    """One rank's part of the command."""
    from fp8moe.cli.trained import find_trained
    from fp8moe.generate.decode import check_prompts, generate

    trained, config = find_trained(arguments, processes), _config(arguments)
    vocabulary = trained.vocabulary()
    ends = _ends(arguments, trained, vocabulary)
    turns = _turns(arguments, trained, vocabulary)
    first = next(turns, None)
    if first is None:
        return
    check_prompts(first[0], trained.config.model.max_seq_len)
    with trained.loaded(averaged=arguments.ema) as (model, mesh, _):
        graphs = trained.graphs(arguments, mesh, config)
        turn: tuple[list[list[int]], Callable[[str], None]] | None = first
        while turn is not None:
            prompts, answered = turn
            shown = _Shown(vocabulary, ends, arguments.stop, prompts, silent=mesh.rank > 0)
            completions, figures = generate(
                model, prompts, config, mesh, num_ids=vocabulary.num_ids, accept=shown.accept, graphs=graphs
            )
            shown.finish()
            if mesh.rank == 0:
                print(described(figures, mtp=config.mtp), file=sys.stderr, flush=True)
                if arguments.json is not None:
                    _write(arguments.json, completions, shown.streams, vocabulary, figures)
            answered(shown.streams[0].text)
            turn = next(turns, None)


def _turns(
    arguments: argparse.Namespace, trained: Trained, vocabulary: Vocabulary
) -> Iterator[tuple[list[list[int]], Callable[[str], None]]]:
    """Prompts to be continued together, and what to do with the first one's completion; one a turn of a chat."""
    from fp8moe.data.chat_tokens import encode_asked
    from fp8moe.generate.text import read_chat, read_prompts

    if arguments.chat is None:
        texts = [*arguments.prompt, *(text for path in arguments.file for text in read_prompts(path))]
        yield [vocabulary.encode(text) for text in texts], lambda text: None
        return
    template = _template(trained, vocabulary)
    messages: list[dict[str, str]] = []
    given = iter([read_chat(arguments.chat)]) if arguments.chat != "-" else _lines_of_stdin()

    def answered(text: str) -> None:
        messages.append({"role": "assistant", "content": text})

    for more in given:
        messages.extend(more)
        yield [encode_asked(template, vocabulary.tokenizer, messages)], answered


def _lines_of_stdin() -> Iterator[list[dict[str, str]]]:
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield [{"role": "user", "content": line.rstrip("\n")}]


class _Shown:
    """Completions on stdout: the first that is not over as it grows, the others behind it."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        ends: frozenset[int],
        stops: Sequence[str],
        prompts: Sequence[Sequence[int]],
        *,
        silent: bool,
    ) -> None:
        from fp8moe.generate.text import TextStream

        self.streams = [TextStream(vocabulary, ends, stops) for _ in prompts]
        self._prompts = [vocabulary.decode(prompt) for prompt in prompts]
        self._completions: dict[int, Completion] = {}
        self._current, self._printed, self._silent = 0, 0, silent

    def accept(self, completion: Completion, token: int) -> bool:
        """Take a token; whether it ends the completion."""
        self._completions[completion.number] = completion
        _, is_over = self.streams[completion.number].add(token)
        self._show()
        return is_over

    def finish(self) -> None:
        """Everything is over."""
        assert all([self._is_over(number) for number in range(len(self.streams))])
        self._show()
        assert self._silent or self._current == len(self.streams)

    def _is_over(self, number: int) -> bool:
        """Whether nothing more comes; what was held back is then part of the text."""
        completion = self._completions.get(number)
        if completion is None or completion.ended is None:
            return False
        if completion.ended != "stop":
            self.streams[number].close()
        return True

    def _show(self) -> None:
        if self._silent:
            return
        while self._current < len(self.streams):
            is_over = self._is_over(self._current)
            text = self._header() + self._prompts[self._current] + self.streams[self._current].text
            sys.stdout.write(text[self._printed :])
            sys.stdout.flush()
            self._printed = len(text)
            if not is_over:
                return
            sys.stdout.write("\n")
            self._current, self._printed = self._current + 1, 0
        sys.stdout.flush()

    def _header(self) -> str:
        count = len(self.streams)
        return f"--- {self._current + 1} of {count}\n" if count > 1 else ""


def described(figures: Figures, *, mtp: bool) -> str:
    """Figures of a generation as one line."""
    after = (figures.steps + figures.accepted) / max(figures.decode_seconds, 1e-9)
    line = (
        f"{figures.new_tokens} tokens, {after:,.1f} tokens/s after {figures.prompt_tokens} prompt tokens in "
        f"{figures.prompt_seconds:.2f} s"
    )
    if not mtp:
        return line
    share = figures.accepted / max(figures.drafts, 1)
    return f"{line}; MTP: {share:.1%} of {figures.drafts} guesses accepted"


def _write(
    path: Path,
    completions: Sequence[Completion],
    streams: Sequence[TextStream],
    vocabulary: Vocabulary,
    figures: Figures,
) -> None:
    from dataclasses import asdict

    rows = [
        {"prompt": vocabulary.decode(one.prompt), "completion": stream.text, "ids": one.ids, "ended": one.ended}
        for one, stream in zip(completions, streams, strict=True)
    ]
    path.write_text(json.dumps({"completions": rows, "figures": asdict(figures)}, indent=1) + "\n", encoding="utf-8")
