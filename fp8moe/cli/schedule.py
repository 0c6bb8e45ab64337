"""`fp8moe schedule`: simulates, draws and compares pipeline schedules, without a process group or a GPU.

Prints the timeline, bubble and memory; writes SVG, Chrome trace and JSON when asked. With --model the stages are that
model's: the partition, parameters and activation memory of each rank are shown, and the timeline uses the stages' own
costs. Without it no torch is loaded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8moe.cli.command import Parser, check_file, make_parser, parse
from fp8moe.errors import ConfigError
from fp8moe.layers.recipe import Precision, Recipe, Recompute
from fp8moe.plan.schedule_files import as_json, schedule_trace, svg
from fp8moe.plan.schedule_tables import (
    beside_published,
    caption,
    compare,
    is_published,
    partition_table,
    published_costs,
    published_table,
)
from fp8moe.plan.schedule_text import LEGEND, draw
from fp8moe.schedule.action import Schedule
from fp8moe.schedule.build import SCHEDULES, build_schedule
from fp8moe.schedule.simulate import Costs, Timeline, simulate

if TYPE_CHECKING:  # a model's configuration loads torch, which takes seconds that a picture need not wait for
    from fp8moe.model.config import ModelConfig

COST_KEYS = {"F": "forward", "B": "backward", "W": "weight", "FB": "overlapped", "message": "message"}
DEEPSEEK = "deepseek-v3"
# Options of a model's stages and their defaults.
_OF_A_MODEL = {"layout": None, "seq_len": None, "micro_batch": 1, "ep": 1, "precision": "fp8",
               "recompute": ",".join(Recompute)}  # fmt: skip


DESCRIPTION = """\
Simulate, draw and compare pipeline schedules.

  fp8moe schedule --pp 8 --microbatches 20                              dualpipe, drawn in the terminal
  fp8moe schedule --pp 16 --microbatches 120 --cost deepseek-v3 --compare
  fp8moe schedule --name zb1p --svg zb1p.svg
"""


def command_parser() -> Parser:
    """The parser of the command line."""
    parser = make_parser("schedule", DESCRIPTION, settings=True)
    add = parser.add_argument
    add("--name", "--schedule", default="dualpipe", metavar="NAME", help=f"{', '.join(SCHEDULES)} (dualpipe)")
    add("--pp", type=int, default=8, metavar="N", help="pipeline ranks (8)")
    add("--microbatches", type=int, metavar="N", help="micro-batches of a step (20, or 2 a rank if that is more)")
    add(
        "--cost",
        default="F=1,B=2,W=1,FB=2.6",
        metavar="F=,B=,W=,FB=,message=",
        help="times of one stage: forward, whole backward, its weight part, overlapped pair (F+B when left out), one "
        f"message (0); or {DEEPSEEK}, from its published step (F=1,B=2,W=1,FB=2.6)",
    )
    add("--svg", metavar="FILE", help="write the picture")
    add("--trace", metavar="FILE", help="write a Chrome trace, for Perfetto")
    add("--json", metavar="FILE", help="write actions with start and end, makespan, bubble and peak_activations")
    add("--compare", action="store_true", help="print a table of all schedules at this cost")
    add("--width", type=int, metavar="COLUMNS", help="columns of the timeline (the terminal's)")
    add(
        "--colour",
        choices=("auto", "always", "never"),
        default="auto",
        help="colours of the timeline (auto: on a terminal)",
    )
    add = parser.add_argument_group("a model's stages; key=value settings change the model").add_argument
    add("--model", metavar="NAME", help="a model of configs/model: tiny, dsv3_671b, ...")
    add("--layout", metavar="N,N,...", help="blocks of each stage (balanced by cost)")
    add("--seq-len", type=int, metavar="N", help="tokens of a sequence (the model's longest)")
    add("--micro-batch", type=int, default=1, metavar="N", help="sequences of a micro-batch (1)")
    add("--ep", type=int, default=1, metavar="N", help="ranks that share the experts (1)")
    add("--precision", choices=[*Precision], default="fp8", help="precision of activations (fp8)")
    every = _OF_A_MODEL["recompute"]
    add("--recompute", default=every, metavar="NAME,...", help=f"what the backward computes again ({every})")
    return parser


def _files(options: argparse.Namespace) -> None:
    """Raise ConfigError, before any work, where a file can't be written."""
    for name in ("svg", "trace", "json"):
        if (path := getattr(options, name)) is not None:
            check_file(f"--{name}", Path(path), f"schedule.{name}")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0."""
    _run(parse(command_parser(), argv))
    return 0


def parse_costs(text: str) -> Costs:
    """Costs of `F=1,B=2,W=1,FB=2.6,message=0.1`, any of them in any order, or of the published step by its name."""
    if text == DEEPSEEK:
        return published_costs()
    given: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in COST_KEYS:
            raise ConfigError(
                f"--cost {item!r} is not a cost: use {', '.join(f'{k}=' for k in COST_KEYS)} or {DEEPSEEK}"
            )
        try:
            given[COST_KEYS[key]] = float(value)
        except ValueError:
            raise ConfigError(f"--cost {key}={value!r} is not a number: write for example {key}=1.5") from None
    return Costs(**given)


def _model(options: argparse.Namespace) -> tuple[ModelConfig, tuple[int, ...] | None] | None:
    """The model asked for and the layout of its stages, --layout before parallel.layout; None without --model."""
    given = [
        f"--{name.replace('_', '-')}" for name, default in _OF_A_MODEL.items() if getattr(options, name) != default
    ]
    if options.model is None:
        if given or options.settings:
            first = (given or options.settings)[0]
            if (name := first.rpartition("=")[2]) in SCHEDULES:
                raise ConfigError(f"{first} is no setting: write --name {name}")
            raise ConfigError(f"{first} needs a model: add --model NAME")
        return None
    from fp8moe.cli.compose import compose

    config = compose([f"model={options.model}", *options.settings]).config
    return config.model, _layout(options.layout) or config.parallel.layout


def _layout(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(count) for count in text.strip("[] ").split(","))
    except ValueError:
        raise ConfigError(f"--layout {text!r} is not a list of block counts: write for example 4,4,3") from None


def _recompute(text: str) -> frozenset[Recompute]:
    names = [name for name in text.strip("[] ").split(",") if name]
    for name in names:
        if name not in list(Recompute):
            raise ConfigError(
                f"--recompute {name!r} is not one of {', '.join(Recompute)}: use some of them, or '' for nothing"
            )
    return frozenset(Recompute(name) for name in names)


def _at_least_one(options: argparse.Namespace) -> None:
    for name in ("seq_len", "micro_batch", "ep", "width"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1")


def _run(options: argparse.Namespace) -> None:
    _at_least_one(options)
    _files(options)
    microbatches = max(20, 2 * options.pp) if options.microbatches is None else options.microbatches
    costs = parse_costs(options.cost)
    schedule = build_schedule(options.name, options.pp, microbatches)
    asked = _model(options)
    timeline, tables = (simulate(schedule, costs), []) if asked is None else _of_model(options, *asked, schedule, costs)
    if options.cost == DEEPSEEK and is_published(schedule):
        tables.append(published_table(beside_published(timeline)))
    if options.compare:
        tables.append(compare(options.pp, microbatches, costs))
    _show(options, timeline, tables)
    _write(options, timeline)


def _of_model(
    options: argparse.Namespace, config: ModelConfig, layout: tuple[int, ...] | None, schedule: Schedule, costs: Costs
) -> tuple[Timeline, list[str]]:
    """The timeline at the model's own stage costs, and the table of its ranks."""
    from fp8moe.model.memory import MicroBatch
    from fp8moe.model.partition import partition, relative_costs

    num_experts = config.experts.num_experts
    if num_experts % options.ep:
        nearest = max(n for n in range(1, options.ep) if num_experts % n == 0)
        raise ConfigError(f"--ep {options.ep} does not divide num_experts={num_experts}: use {nearest}")
    seq_len = options.seq_len or config.max_seq_len
    stages = partition(config, schedule.num_stages, seq_len=seq_len, folded=schedule.is_folded, layout=layout)
    timeline = simulate(schedule, replace(costs, stages=relative_costs(config, stages, seq_len)))
    recipe = Recipe(Precision(options.precision), _recompute(options.recompute))
    sizes = MicroBatch(options.micro_batch, seq_len, recipe)
    return timeline, [partition_table(config, stages, timeline, sizes, options.ep)]


def _show(options: argparse.Namespace, timeline: Timeline, tables: list[str]) -> None:
    width = options.width or shutil.get_terminal_size((80, 24)).columns
    colour = options.colour == "always" or (options.colour == "auto" and sys.stdout.isatty())
    print(draw(timeline, width, colour=colour))
    print()
    for line in (LEGEND, *caption(timeline)):
        print(textwrap.fill(line, max(width, 40), subsequent_indent="  "))
    for text in tables:
        print(f"\n{text}")


def _write(options: argparse.Namespace, timeline: Timeline) -> None:
    files = (
        (options.svg, lambda: svg(timeline, caption(timeline))),
        (options.trace, lambda: json.dumps(schedule_trace(timeline))),
        (options.json, lambda: json.dumps(as_json(timeline))),
    )
    for name, content in files:
        if name is not None:
            try:
                Path(name).write_text(content(), encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"{name} can't be written ({error.strerror}): choose another file") from error
            print(f"wrote {name}")
