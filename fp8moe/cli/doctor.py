"""`fp8moe doctor`: whether this machine, or all nodes under a launcher, are fit to train, and what to fix."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fp8moe.cli.command import Parser, check_file, make_parser, parse
from fp8moe.cli.launch import run_command
from fp8moe.errors import ConfigError
from fp8moe.limits import shown

DESCRIPTION = """\
Look at versions, kernel back ends, GPUs, memory, limits, clocks and the run directory; under a launcher also measure
the network between all ranks, and name the odd node. Nothing is changed. Ends with what to fix: exit code 2 where
something prevents a run, else 0.

  fp8moe doctor run_dir=runs/mine                                        this machine
  fp8moe doctor --nproc 4                                                four processes of it, with their messages
  torchrun --nnodes 2 ... -m fp8moe doctor run_dir=PATH --json FILE      all nodes
"""
SECONDS = 120.0


def command_parser() -> Parser:
    """The parser of the command line."""
    parser = make_parser("doctor", DESCRIPTION)
    parser.add_argument("run_dir", nargs="?", metavar="run_dir=PATH", help="where a run would write")
    parser.add_argument("--json", metavar="FILE", help="write the findings and figures there as well")
    parser.add_argument("--nproc", metavar="N", help="processes to start on this machine; auto: one a GPU")
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", default=SECONDS, help=f"limit of each message ({SECONDS:g})"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; 0, or an exception of exit code 2 where something prevents a run."""
    arguments = parse(command_parser(), argv)
    name, _, path = (arguments.run_dir or "run_dir=").partition("=")
    if name != "run_dir" or (arguments.run_dir and not path):
        raise ConfigError(f"{shown(arguments.run_dir)} is no argument of doctor: write run_dir=PATH")
    if not 1 <= arguments.timeout <= 86400:
        raise ConfigError(f"--timeout={arguments.timeout:g} must be from 1 to 86400 seconds: use {SECONDS:g}")
    if arguments.json is not None:
        check_file("--json", Path(arguments.json), "doctor.json")

    def examined(world_size: int) -> None:
        _examine(world_size, Path(path) if path else None, arguments.timeout, arguments.json)

    return run_command("doctor", argv, arguments.nproc, examined)


def _examine(world_size: int, run_dir: Path | None, seconds: float, json_file: str | None) -> None:
    """Print the report, on rank 0. Raises ConfigError there where something prevents a run."""
    from fp8moe.doctor.examine import examine
    from fp8moe.doctor.finding import Level

    report = examine(world_size, run_dir, seconds)
    if report is None:
        return
    print(report.as_text(), flush=True)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
    stops = report.of_level(Level.STOP)
    if stops:
        what = "1 finding prevents" if len(stops) == 1 else f"{len(stops)} findings prevent"
        raise ConfigError(f"{what} a run: see the lines with X above")
