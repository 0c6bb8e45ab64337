"""`fp8moe train`: one process, a worker among many, or the launcher of them, by how it was started.

RANK in the environment makes a worker (torchrun, Slurm, or `--nproc`); `--nproc N` makes the launcher; else the run is
one process. What can be known without a process group is checked before any is started.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from fp8moe.cli.command import Parser, make_parser, parse
from fp8moe.cli.launch import count_processes, die_with_launcher, is_worker, launch, report
from fp8moe.errors import EXIT

DESCRIPTION = """\
Train a model. Settings are key=value, groups included: model=tiny precision=bf16 parallel.ep=2 steps=100
run_dir=runs/mine resume=auto. `--cfg job` shows them all.

  fp8moe train experiment=quickstart                     one process
  fp8moe train --nproc 4 experiment=quickstart           four processes on this machine
  torchrun --nproc-per-node 8 -m fp8moe train ...        the same under torchrun, one machine or many
"""


def command_parser() -> Parser:
    """The command's own options; all else is settings."""
    parser = make_parser("train", DESCRIPTION, settings=True)
    parser.add_argument("--nproc", metavar="N", help="start N processes here; auto: one a GPU, 4 where there is none")
    parser.add_argument("--cfg", choices=["job"], help="print the resolved configuration and exit")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit code is 0, or that of what went wrong."""
    arguments = parse(command_parser(), argv)
    if is_worker():
        return _work(arguments)
    from fp8moe.cli.compose import as_yaml, compose
    from fp8moe.train.config import resolve

    composed = compose(arguments.settings)
    if arguments.cfg:
        print(composed.text, end="")
        return 0
    num_processes = None if arguments.nproc is None else count_processes(arguments.nproc)
    config = resolve(composed.config, num_processes or 1)
    if num_processes is not None:
        return launch(["train", *arguments.settings], num_processes)
    from fp8moe.train.loop import train

    train(config, as_yaml)
    return 0


def _work(arguments: argparse.Namespace) -> int:
    """A rank's part. Its failure goes where the launcher finds it, and is printed once."""
    die_with_launcher()
    if arguments.nproc is not None and int(os.environ["RANK"]) == 0:
        raise ValueError(f"--nproc={arguments.nproc} starts processes and RANK says this is one: leave --nproc out")
    try:
        from fp8moe.cli.compose import as_yaml, compose
        from fp8moe.train.config import resolve
        from fp8moe.train.loop import train

        composed = compose(arguments.settings)
        if arguments.cfg:
            if int(os.environ["RANK"]) == 0:
                print(composed.text, end="")
            return 0
        train(resolve(composed.config, int(os.environ.get("WORLD_SIZE", "1"))), as_yaml)
    except Exception as error:
        from fp8moe.cli.command import explain

        failure = explain(error)
        report(failure)
        if failure.code == EXIT["hang"]:
            from fp8moe.parallel import hang

            hang.end_frozen()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failure.code)  # an ordinary end would wait for collectives that the others are stuck in
    return 0
