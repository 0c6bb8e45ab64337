"""`fp8moe watch RUN`: the run in a directory, in the terminal, while it trains and afterwards."""

from __future__ import annotations

from collections.abc import Sequence

from fp8moe.cli.command import Parser, make_parser, parse
from fp8moe.errors import ConfigError

DESCRIPTION = """\
Show a run in the terminal: loss curve, speed, time left, experts, ranks that lag, last checkpoint, events. It reads the
files of the run directory alone, so it works on any machine that sees it, of a run that trains, has ended or was
killed. Ctrl-C leaves; the run is not touched.

  fp8moe watch runs/mine                  until the run has finished
  fp8moe watch runs/mine --once           print it once, as it also does where stdout is no terminal
"""
LEAST, MOST = 0.1, 3600.0


def command_parser() -> Parser:
    """The parser of the command line."""
    parser = make_parser("watch", DESCRIPTION)
    parser.add_argument("run_dir", metavar="RUN", help="the directory of a run")
    parser.add_argument("--once", action="store_true", help="print once and end")
    parser.add_argument("--interval", type=float, metavar="S", default=2.0, help="seconds between looks (2)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0."""
    arguments = parse(command_parser(), argv)
    if not LEAST <= arguments.interval <= MOST:
        raise ConfigError(f"--interval={arguments.interval:g} must be {LEAST:g} to {MOST:g} seconds: use --interval 2")
    from fp8moe.report.watch import watch

    watch(arguments.run_dir, once=arguments.once, interval=arguments.interval)
    return 0
