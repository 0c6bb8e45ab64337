"""`fp8moe train`: trains in one process, as a worker of many, or launches the workers.

RANK in the environment makes a worker (of torchrun, Slurm, or `--nproc`); `--nproc N` makes the launcher; otherwise the
run is one process. All that can be checked without a process group is checked before any process is started.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fp8moe.cli.command import Parser, make_parser, parse
from fp8moe.cli.launch import LAUNCHED, count_processes, die_with_launcher, end_worker, is_worker, launch
from fp8moe.cli.threads import choose_threads
from fp8moe.errors import ConfigError
from fp8moe.train.signals import handling_signals

if TYPE_CHECKING:
    from fp8moe.cli.compose import Composed
    from fp8moe.train.config import TrainConfig
    from fp8moe.train.method import Method

DESCRIPTION = """\
Train a model. Settings are key=value, groups included: model=tiny precision=bf16 parallel.ep=2 steps=100
run_dir=runs/mine. `fp8moe keys` explains them, `--cfg job` shows all with their values. A run goes on with its own
configuration: resume=runs/mine steps=200.

  fp8moe train experiment=quickstart                     one process
  fp8moe train --nproc 4 experiment=quickstart           four processes on this machine
  fp8moe train resume=runs/mine steps=200                goes on there; only what is typed changes
  fp8moe train experiment=./mine.yaml                    settings from a file of one's own
  torchrun --nproc-per-node 8 -m fp8moe train ...        the same under torchrun, one machine or many
"""


@dataclass(frozen=True)
class Command:
    """A command that trains. begin: the settings of a new run as a tree, from those that are typed; None: `tree_of`.
    method: makes what its steps work on; None: pretraining."""

    name: str
    parser: Callable[[], Parser]
    begin: Callable[[Sequence[str]], dict[str, Any]] | None = None
    method: Callable[[], Method] | None = None

    def train(self, config: TrainConfig) -> None:
        """Run a resolved configuration to its end."""
        from fp8moe.cli.compose import as_yaml
        from fp8moe.cli.report import at_end
        from fp8moe.cli.run_kind import command_of
        from fp8moe.cli.teacher import find_teacher
        from fp8moe.generate.samples import commands, last_lines
        from fp8moe.interop.hf_model import open_released
        from fp8moe.train.loop import train

        says, command = config.logging.summary, command_of(config.data.source)
        report = partial(at_end, silent=not says)
        if self.method is not None:
            if config.distill.teacher is not None:
                raise ConfigError(f"fp8moe {self.name} learns from no teacher: use distill.teacher=null")
            last_words = partial(commands, command=command) if says else None
            train(config, as_yaml, open_released, last_words, report, self.method())
            return
        method = None
        if (teacher := find_teacher(config)) is not None:
            from fp8moe.post.distill.taught import Taught

            method = Taught(teacher)
        last_words = partial(last_lines, command=command) if says else None
        train(config, as_yaml, open_released, last_words, report, method)


def parser_of(name: str, description: str) -> Parser:
    """The parser of the command line of a command that trains."""
    parser = make_parser(name, description, settings=True)
    parser.add_argument(
        "--nproc", metavar="N", help="processes to start on this machine; auto: one a GPU, 4 without GPUs"
    )
    parser.add_argument("--from", dest="from_run", metavar="RUN", help="a new run with the configuration of RUN")
    parser.add_argument(
        "--cfg", choices=["job"], help="print the configuration and exit, with what --nproc N processes fill in"
    )
    return parser


def command_parser() -> Parser:
    """The parser of the command line."""
    return parser_of("train", DESCRIPTION)


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code; a worker that fails ends its process with the failure's code."""
    return run(Command("train", command_parser), argv)


def run(command: Command, argv: Sequence[str]) -> int:
    """The same for any command that trains."""
    if is_worker():
        return _work(command, argv)
    with handling_signals(end_worker):
        return _run(command, argv)


def _run(command: Command, argv: Sequence[str]) -> int:
    """The run in this process, or the launcher of its workers."""
    arguments = parse(command.parser(), argv)
    threads = choose_threads(os.environ) if arguments.nproc is None else None  # before torch is loaded
    from fp8moe.cli.compose import tree_of
    from fp8moe.cli.epochs import with_steps
    from fp8moe.cli.resume import compose_run, note
    from fp8moe.cli.teacher import find_teacher, teacher_model
    from fp8moe.data.check import check_files
    from fp8moe.interop.hf_model import open_released
    from fp8moe.plan.fit import check_fits
    from fp8moe.plan.micro_batch import choose_micro_batch
    from fp8moe.train.config import resolve
    from fp8moe.train.rendezvous import place

    if arguments.nproc is None:
        place(os.environ)
    num_processes = None if arguments.nproc is None else count_processes(arguments.nproc)
    count = num_processes or 1
    begin = command.begin or tree_of
    composed, origin = compose_run(arguments.settings, count, arguments.from_run, begin, command.name)
    if arguments.cfg:
        print(_job_text(composed, count), end="")
        return 0
    teacher = teacher_model(composed.config)
    chosen = choose_micro_batch(composed.config, count, count, teacher)
    config, length = with_steps(chosen.config, count)
    config = resolve(config, count, open_released)
    check_fits(config, count, teacher)
    check_files(config.data)
    for sentence in filter(None, (note(origin, config), chosen.sentence, length, threads)):
        print(sentence, flush=True)
    if num_processes is not None:
        find_teacher(config)  # before processes start
        from_run = [] if arguments.from_run is None else ["--from", arguments.from_run]
        return launch([command.name, *from_run, *arguments.settings], num_processes)
    command.train(config)
    return 0


def _job_text(composed: Composed, world_size: int) -> str:
    """The configuration as YAML with what `world_size` processes fill in; as typed, and why, if they can't run it."""
    from fp8moe.cli.compose import as_yaml
    from fp8moe.cli.teacher import teacher_model
    from fp8moe.interop.hf_model import open_released
    from fp8moe.plan.micro_batch import choose_micro_batch
    from fp8moe.train.config import resolve

    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    try:
        chosen = choose_micro_batch(composed.config, world_size, local, teacher_model(composed.config))
        return as_yaml(resolve(chosen.config, world_size, open_released))
    except ValueError as error:
        return f"# as typed, since {world_size} process{'es' * (world_size > 1)} can't run it: {error}\n{composed.text}"


def _work(command: Command, argv: Sequence[str]) -> int:
    """One rank of the run. A failure is written for the launcher and printed once; it ends the process at once."""
    die_with_launcher()
    with handling_signals(end_worker):
        return _rank(command, argv)


def _rank(command: Command, argv: Sequence[str]) -> int:
    try:
        arguments = parse(command.parser(), argv)
        if arguments.nproc is not None:
            raise ConfigError(f"--nproc={arguments.nproc} starts processes and RANK is set: leave --nproc out")
        from fp8moe.cli.compose import tree_of
        from fp8moe.cli.epochs import with_steps
        from fp8moe.cli.resume import compose_run, note
        from fp8moe.cli.teacher import teacher_model
        from fp8moe.data.check import check_files
        from fp8moe.interop.hf_model import open_released
        from fp8moe.plan.fit import check_fits
        from fp8moe.plan.micro_batch import choose_micro_batch
        from fp8moe.train.config import resolve
        from fp8moe.train.rendezvous import place

        here = place(os.environ)
        world_size, is_first = here.world_size, here.rank == 0
        begin = command.begin or tree_of
        composed, origin = compose_run(arguments.settings, world_size, arguments.from_run, begin, command.name)
        if arguments.cfg:
            if is_first:
                print(_job_text(composed, world_size), end="")
            return 0
        teacher, local = teacher_model(composed.config), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        chosen = choose_micro_batch(composed.config, world_size, local, teacher)
        config, length = with_steps(chosen.config, world_size)
        config = resolve(config, world_size, open_released)
        if LAUNCHED not in os.environ:  # else the launcher did
            check_fits(config, local, teacher)
            check_files(config.data)
            for sentence in filter(None, (note(origin, config), chosen.sentence, length)):
                if is_first:
                    print(sentence, flush=True)
        command.train(config)
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)  # without a message: the launcher prints one
    except Exception as error:
        end_worker(error)
    return 0
