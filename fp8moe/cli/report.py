"""`fp8moe report`: a run's report.html, or one page of several runs; and the report at the end of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fp8moe.cli.command import Parser, check_file, make_parser, parse
from fp8moe.errors import ConfigError

DESCRIPTION = """\
Make one HTML page of a run, or of several side by side: losses, speed, memory, experts, FP8, events, text, settings. It
loads nothing from the network. A run makes its own at its end (report=false: none).

  fp8moe report runs/mine                          runs/mine/report.html
  fp8moe report runs/fp8 runs/bf16 --out both.html
"""


def command_parser() -> Parser:
    """The parser of the command line."""
    parser = make_parser("report", DESCRIPTION)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="run directories, of live or ended runs")
    parser.add_argument(
        "--out", metavar="FILE", help="the page; RUN_DIR/report.html of one run, ./report.html of several"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0."""
    arguments = parse(command_parser(), argv)
    from fp8moe.report.page import NAME, write_report

    out = Path(arguments.out or (Path(arguments.runs[0]) / NAME if len(arguments.runs) == 1 else NAME))
    if arguments.out or out.is_dir():
        check_file("--out", out, NAME)
    if os.path.lexists(out) and not out.is_file():  # a device, which the page would take the place of
        raise ConfigError(f"--out={out} is there and is no ordinary file: use another one, --out {NAME}")
    for note in write_report(arguments.runs, out, _defaults):
        print(note)
    print(f"report: {out}")
    return 0


def at_end(run_dir: Path, *, silent: bool = False) -> None:
    """Write the report of a run that ends here; what goes wrong is said in a line and ends nothing.

    silent: that it was written is not said.
    """
    try:
        from fp8moe.report.page import NAME, write_report
        from fp8moe.train.json_lines import METRICS

        if not (run_dir / METRICS).exists():  # it failed before its first step
            return
        write_report([run_dir], run_dir / NAME, _defaults)
        if not silent:
            print(f"report: {run_dir / NAME}", flush=True)
    except Exception as error:
        print(f"the report of the run can't be written ({error}): fp8moe report {run_dir} tries again", flush=True)


def _defaults() -> dict[str, object]:
    """The configuration of `fp8moe train` without settings."""
    from yaml import safe_load

    from fp8moe.cli.compose import compose

    defaults: dict[str, object] = safe_load(compose([]).text)
    return defaults
