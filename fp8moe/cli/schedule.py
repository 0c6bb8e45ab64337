"""`fp8moe schedule`: a pipeline schedule simulated, drawn and compared, without a process or a GPU.

Prints the time-line, bubble and memory; writes SVG, Chrome trace and JSON when asked. With --model the stages are that
model's: the cut, parameters and activation memory of each rank are shown, and the time-line runs at the stages' own
costs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8moe.cli.command import make_parser
from fp8moe.errors import ConfigError
from fp8moe.layers.recipe import Precision, Recipe, Recompute
from fp8moe.plan.schedule_files import as_json, chrome_trace
from fp8moe.plan.schedule_svg import svg
from fp8moe.plan.schedule_tables import (
    beside_published,
    caption,
    compare,
    is_published,
    published_costs,
    published_table,
)
from fp8moe.plan.schedule_text import LEGEND, draw
from fp8moe.schedule.action import Schedule
from fp8moe.schedule.build import SCHEDULES, build_schedule
from fp8moe.schedule.simulate import Costs, Timeline, simulate

if TYPE_CHECKING:  # torch, which a model's configuration loads, takes seconds that a bare picture need not wait for
    from fp8moe.model.config import ModelConfig

COST_KEYS = {"F": "forward", "B": "backward", "W": "weight", "FB": "overlapped", "message": "message"}
DEEPSEEK = "deepseek-v3"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = make_parser("schedule", "Simulate, draw and compare pipeline schedules.")
    add = out.add_argument
    add("--name", default="dualpipe", metavar="NAME", help=f"{', '.join(SCHEDULES)} (dualpipe)")
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
    add("--compare", action="store_true", help="tabulate all schedules at this cost")
    add("--width", type=int, metavar="COLUMNS", help="of the time-line (the terminal's)")
    add("--colour", choices=("auto", "always", "never"), default="auto", help="of the time-line (auto: on a terminal)")
    model = out.add_argument_group("a model's stages")
    model.add_argument("--model", metavar="NAME", help="a model of configs/model: tiny, dsv3_671b, ...")
    model.add_argument("--layout", metavar="N,N,...", help="blocks of each stage by hand (balanced by cost)")
    model.add_argument("--seq-len", type=int, metavar="N", help="tokens of a sequence (the model's longest)")
    model.add_argument("--micro-batch", type=int, default=1, metavar="N", help="sequences of a micro-batch (1)")
    model.add_argument("--ep", type=int, default=1, metavar="N", help="ranks that share the experts (1)")
    model.add_argument("--precision", choices=("fp8", "bf16", "fp32"), default="fp8", help="of activations (fp8)")
    every = ",".join(Recompute)
    model.add_argument("--recompute", default=every, metavar="NAME,...", help=f"instead of being kept ({every})")
    model.add_argument(
        "override", nargs="*", metavar="key=value", help="changes: model.num_layers=32 parallel.layout=[8,8]"
    )
    return out


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code (0, 2 configuration)."""
    try:
        _run(parser().parse_args(argv))
    except ValueError as error:
        print(f"fp8moe schedule: {error}", file=sys.stderr)
        return ConfigError.exit_code
    except BrokenPipeError:  # the reader has seen enough (`| head`); what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"fp8moe schedule: {error.filename}: {error.strerror or error}: choose another file", file=sys.stderr)
        return ConfigError.exit_code
    return 0


def parse_costs(text: str) -> Costs:
    """`F=1,B=2,W=1,FB=2.6,message=0.1` in any order and number, or the published step's name."""
    if text == DEEPSEEK:
        return published_costs()
    given: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in COST_KEYS:
            raise ConfigError(f"--cost {item!r} is unknown: use {', '.join(f'{k}=' for k in COST_KEYS)} or {DEEPSEEK}")
        try:
            given[COST_KEYS[key]] = float(value)
        except ValueError:
            raise ConfigError(f"--cost {key}={value!r} is no number: write {key}=1.5, say") from None
    return Costs(**given)


def _model(options: argparse.Namespace) -> tuple[ModelConfig, tuple[int, ...] | None] | None:
    """The model that was asked for and its configured layout (--layout goes first), or None."""
    given = [f"--{name}" for name in ("layout", "seq-len") if getattr(options, name.replace("-", "_")) is not None]
    if options.model is None:
        if given or options.override:
            raise ConfigError(f"{(given or options.override)[0]} is about a model's stages: add --model NAME")
        return None
    from fp8moe.cli.compose import compose

    config = compose([f"model={options.model}", *options.override]).config
    return config.model, _layout(options.layout) or config.parallel.layout


def _layout(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(count) for count in text.strip("[] ").split(","))
    except ValueError:
        raise ConfigError(f"--layout {text!r} is no list of block counts: write 4,4,3, say") from None


def _recompute(text: str) -> frozenset[Recompute]:
    names = [name for name in text.strip("[] ").split(",") if name]
    for name in names:
        if name not in list(Recompute):
            raise ConfigError(f"--recompute {name!r} is unknown: use some of {','.join(Recompute)}, or '' for nothing")
    return frozenset(Recompute(name) for name in names)


def _at_least_one(options: argparse.Namespace) -> None:
    for name in ("seq_len", "micro_batch", "ep", "width"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1")


def _run(options: argparse.Namespace) -> None:
    _at_least_one(options)
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
    """The time-line at the model's own stage costs, and the table of its ranks."""
    from fp8moe.model.memory import MicroBatch
    from fp8moe.model.partition import partition, relative_costs
    from fp8moe.plan.stage_table import partition_table

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
        (options.trace, lambda: json.dumps(chrome_trace(timeline))),
        (options.json, lambda: json.dumps(as_json(timeline))),
    )
    for name, content in files:
        if name is not None:
            Path(name).write_text(content(), encoding="utf-8")
            print(f"wrote {name}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
