"""`fp8moe memory`: what each rank of a run holds of weights, gradients and optimizer state, before it starts."""

from __future__ import annotations

from collections.abc import Sequence

from fp8moe.cli.command import Parser, make_parser, parse
from fp8moe.errors import ConfigError

DESCRIPTION = """\
Print the memory of weights, gradients and optimizer state on each pipeline rank, by formula; settings are those of
`fp8moe train`. Activations are in the table of `fp8moe schedule`.

  fp8moe memory --processes 2048 experiment=dsv3_pretrain parallel=dsv3_2048 data.paths=[PREFIX] batch.ramp_from=4096 \\
    batch.increment=1024
"""


def command_parser() -> Parser:
    """The parser of the command line."""
    parser = make_parser("memory", DESCRIPTION, settings=True)
    parser.add_argument("--processes", type=int, metavar="N", default=1, help="processes of the whole run (1)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0."""
    arguments = parse(command_parser(), argv)
    if arguments.processes < 1:
        raise ConfigError(f"--processes={arguments.processes} must be at least 1: use 1 or more")
    from fp8moe.cli.compose import compose
    from fp8moe.plan.memory_table import memory_table
    from fp8moe.train.config import resolve

    print(memory_table(resolve(compose(arguments.settings).config, arguments.processes)))
    return 0
