"""`fp8moe distill generate`: a teacher's samples of prompts, verified, as chats for supervised fine-tuning.

The teacher is a checkpoint or a Hugging Face directory here, or an OpenAI-compatible endpoint. All samples go to
OUT.samples.jsonl as they come, and the command goes on from there; OUT.jsonl is made of it at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fp8moe.cli.command import Parser, add_graphs, make_parser, parse
from fp8moe.cli.launch import count_processes, is_worker, run_command
from fp8moe.cli.threads import usable_cores
from fp8moe.errors import DataError

if TYPE_CHECKING:
    from fp8moe.cli.distill_job import Job
    from fp8moe.post.distill.collect import Collector
    from fp8moe.post.endpoint import EndpointError

DESCRIPTION = """\
Have a teacher answer prompts, keep what verifiers accept, and write it as chats for fine-tuning. Prompts are JSON lines
with `prompt`, and `answer` or `tests` where a verifier needs them. Every sample is stored as it comes, in
OUT.samples.jsonl: the same command goes on from there.

  fp8moe distill generate runs/mine --prompts sums.jsonl --output taught.jsonl --samples 4 --verify answer
  fp8moe distill generate --endpoint http://localhost:8000/v1 --model deepseek-r1 --prompts sums.jsonl \\
      --output taught.jsonl --form both --verify answer --verify length:max_tokens=8192 --keep 1 --prefer shortest

verifiers: answer, code, language, length, repetition, or module:function; with options as code:seconds=2,memory_mb=512.
"""


def command_parser() -> Parser:
    """The parser of the command line."""
    parser = make_parser("distill", DESCRIPTION)
    parser.add_argument("action", choices=["generate"], help="what to do")
    parser.add_argument("run", nargs="?", metavar="RUN", help="the teacher: as for fp8moe generate")
    parser.add_argument("settings", nargs="*", default=[], metavar="key=value", help="precision=bf16, device=cpu")
    parser.add_argument(
        "--prompts", required=True, metavar="PATH", help="JSON lines with prompt, answer, tests, response"
    )
    parser.add_argument("--output", required=True, metavar="PATH", help="chats to write, a .jsonl")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="of a prompt and form (1)")
    parser.add_argument(
        "--form",
        default="short",
        choices=["short", "long", "both"],
        help="short: prompt and answer; long: with a system prompt and the reasoning",
    )
    parser.add_argument("--system-prompt", metavar="PATH", help="of the long form, in place of the built-in one")
    _add_sampling(parser)
    group = parser.add_argument_group("a teacher here")
    group.add_argument("--plain", action="store_true", help="prompts go to the model as text, without a chat template")
    group.add_argument(
        "--stop-token", action="append", default=[], metavar="TOKEN", help="a special token that ends an answer"
    )
    group.add_argument("--batch", type=int, default=32, metavar="N", help="answers that go on together (32)")
    add_graphs(group)
    group.add_argument("--nproc", metavar="N", help="processes to start on this machine; auto: one a GPU")
    group.add_argument("--ema", action="store_true", help="use the average of the weights")
    group.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json, where the run directory has none")
    _add_endpoint(parser)
    group = parser.add_argument_group("what is kept")
    group.add_argument(
        "--verify", action="append", default=[], metavar="NAME", help="a verifier; may be repeated, asked in this order"
    )
    group.add_argument(
        "--verify-timeout", type=float, default=60.0, metavar="S", help="seconds of a call of module:function (60)"
    )
    group.add_argument("--verify-again", action="store_true", help="ask the verifiers about stored samples again")
    group.add_argument("--workers", type=int, metavar="N", help="samples that are verified at once (cores)")
    group.add_argument("--keep", type=int, metavar="K", help="of a prompt and form at most (all that are accepted)")
    group.add_argument("--prefer", default="first", choices=["first", "shortest"], help="which of them (first)")
    return parser


def _add_sampling(parser: Parser) -> None:
    parser.add_argument("--temperature", type=float, default=0.6, metavar="X", help="0 is greedy (0.6)")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="X", help="share of the probability kept (0.95)")
    parser.add_argument("--max-tokens", type=int, default=2048, metavar="N", help="tokens of an answer (2048)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="text that ends an answer")


def _add_endpoint(parser: Parser) -> None:
    group = parser.add_argument_group("a teacher behind an endpoint")
    group.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible, up to and with /v1")
    group.add_argument("--model", metavar="NAME", help="the model's name there")
    group.add_argument("--api", default="chat", choices=["chat", "completions"], help="chat/completions or completions")
    group.add_argument(
        "--key-env",
        default="OPENAI_API_KEY",
        metavar="VARIABLE",
        help="environment variable with the key (OPENAI_API_KEY)",
    )
    group.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at once (8)")
    group.add_argument("--tries", type=int, default=6, metavar="N", help="of a request (6)")
    group.add_argument(
        "--wait", type=float, default=1.0, metavar="S", help="seconds before the second try, doubled each time (1)"
    )
    group.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds without a byte (600)")
    group.add_argument("--body", metavar="JSON", help='added to each request: \'{"top_k": 20, "seed": null}\'')


def main(argv: Sequence[str]) -> int:
    """The command `fp8moe distill`."""
    arguments = parse(command_parser(), argv)
    if not is_worker():
        _check(arguments, 1 if arguments.nproc is None else count_processes(arguments.nproc))
    return run_command("distill", argv, arguments.nproc, lambda processes: _generate(arguments, processes))


def _check(arguments: argparse.Namespace, processes: int) -> None:
    """What can be known before a process starts. Raises with one sentence."""
    from fp8moe.cli.distill_job import Job

    Job(arguments, processes).collector()


def _generate(arguments: argparse.Namespace, processes: int) -> None:
    """One rank's part of the command."""
    from tqdm import tqdm

    from fp8moe.cli.distill_job import Job
    from fp8moe.post.distill.store import SampleWriter
    from fp8moe.post.endpoint import EndpointError

    job = Job(arguments, processes)
    collector = job.collector()
    asked, workers = len(collector.missing()), arguments.workers or usable_cores()
    down: EndpointError | None = None
    with contextlib.ExitStack() as stack:
        teacher, writes = stack.enter_context(job.teacher(needed=asked > 0))
        if not writes:
            collector.collect(teacher, None, workers)
            return
        writer = stack.enter_context(SampleWriter(job.stored_at).open(job.settings()))
        bar = stack.enter_context(tqdm(total=asked, unit="sample", disable=None, desc="distill"))
        try:
            collector.collect(teacher, writer, workers, bar.update)
        except EndpointError as error:
            down = error
    _finish(job, collector, down)


def _finish(job: Job, collector: Collector, down: EndpointError | None) -> None:
    """Write the chats, print the table, and say in one sentence what is missing."""
    from fp8moe.data.durable import unwritable, write_text
    from fp8moe.post.distill.chosen import choose
    from fp8moe.post.distill.store import ADVICE
    from fp8moe.post.endpoint import EndpointError

    arguments = job.arguments
    rows, table = choose(
        collector.wanted, collector.samples, job.verifiers, keep=arguments.keep, prefer=arguments.prefer
    )
    table.failed = len(collector.failed)
    try:
        lines = (json.dumps(row, ensure_ascii=False).encode("utf-8", "replace").decode() for row in rows)
        write_text(job.output, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise unwritable(job.output, error, ADVICE) from error
    print(table.text())
    print(f"{job.output}: {len(rows):,} chats; {job.stored_at}: all samples with their verdicts")
    kept = f"{table.samples} of {table.asked} samples are kept in {job.stored_at}, and the same command goes on"
    if down is not None:
        raise EndpointError(f"{down}: {kept}")
    if again := sum(failed.again for failed in collector.failed):
        raise EndpointError(f"{again} samples got no answer: {kept}")
    if not rows:
        raise DataError(f"none of {table.samples} samples was accepted: {job.stored_at} says of each why not")
