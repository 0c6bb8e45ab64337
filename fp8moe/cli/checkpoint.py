"""`fp8moe verify PATH` and `fp8moe inspect PATH`: whether a checkpoint's bytes are right, and what is inside.

PATH is a checkpoint, a run directory or its `checkpoints` folder, or the URL of one: all complete checkpoints in it are
verified, the newest is inspected. Neither loads torch's distributed parts or executes anything that it reads.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8moe.cli.command import Parser, make_parser, parse
from fp8moe.errors import EXIT, ConfigError, DataError

if TYPE_CHECKING:
    from fp8moe.train.checkpoint import Location

VERIFY = """\
Verify checkpoints: size and hash of every file against the manifest. Exit code 3 when one is damaged.

  fp8moe verify runs/mine                        every checkpoint of a run
  fp8moe verify runs/mine/checkpoints/step-80    one
"""
INSPECT = """\
Print what a checkpoint holds: its step, schedule and samples, what wrote it, its tensors by kind, its files.

  fp8moe inspect runs/mine                       the newest of a run
"""
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "U8": 1}


def found(path: str) -> list[Location]:
    """The complete checkpoints at or below `path`, oldest first. Raises ConfigError where there is none."""
    from fp8moe.train.checkpoint import below, is_complete, location, looking_up
    from fp8moe.train.checkpoint.search import none_at

    given = location(path)
    with looking_up(path):
        if is_complete(given):
            return [given]
        if inside := below(given) or _elsewhere(given):
            return inside
        if isinstance(given, Path) and (given / "config.json").is_file():
            raise ConfigError(f"{path} is a Hugging Face directory, not a checkpoint: fp8moe import makes a run of it")
    raise ConfigError(none_at(given, path))


def _elsewhere(given: Location) -> list[Location]:
    """The checkpoints of a run directory whose configuration has a `checkpoint.path`."""
    from fp8moe.cli.resume import CONFIG_FILE, read_configuration
    from fp8moe.train.checkpoint import complete, location

    if not isinstance(given, Path) or not (given / CONFIG_FILE).is_file():
        return []
    path = read_configuration(given).get("checkpoint", {}).get("path")
    return [] if path is None else complete(location(path))


def verify_parser() -> Parser:
    """The parser of `fp8moe verify`."""
    parser = make_parser("verify", VERIFY)
    parser.add_argument("path", metavar="PATH", help="a checkpoint, or a run directory; a path or a URL")
    return parser


def inspect_parser() -> Parser:
    """The parser of `fp8moe inspect`."""
    parser = make_parser("inspect", INSPECT)
    parser.add_argument("path", metavar="PATH", help="a checkpoint, or a run directory: its newest; a path or a URL")
    return parser


def verify(argv: Sequence[str]) -> int:
    """The command `fp8moe verify`."""
    from fp8moe.train.checkpoint.manifest import problems, read_manifest

    damaged = 0
    for checkpoint in found(parse(verify_parser(), argv).path):
        started = time.perf_counter()
        wrong = problems(checkpoint)
        seconds = time.perf_counter() - started
        for problem in wrong:
            print(f"{checkpoint}: {problem}", file=sys.stderr)
        damaged += bool(wrong)
        if not wrong:
            files = read_manifest(checkpoint).values()
            size = sum(file.size for file in files)
            print(f"{checkpoint}: ok, {len(files)} files, {_amount(size)}, {size / seconds / 1e9:.2f} GB/s")
    return EXIT["data"] if damaged else 0


def inspect(argv: Sequence[str]) -> int:
    """The command `fp8moe inspect`."""
    print(described(found(parse(inspect_parser(), argv).path)[-1]))
    return 0


def described(checkpoint: Location) -> str:
    """What is inside, as text. Raises DataError where a file can't be read."""
    from fp8moe.train.checkpoint.files import folder_of, read_text, reason
    from fp8moe.train.checkpoint.manifest import read_manifest
    from fp8moe.train.checkpoint.state import STATE_FILE
    from fp8moe.train.checkpoint.storage import read_index

    folder = folder_of(checkpoint)
    try:
        state = json.loads(read_text(folder, STATE_FILE))
        files, index = read_manifest(checkpoint), read_index(folder)
        lines = [str(checkpoint), *_numbers(state), "", *_kinds(index), "", f"{len(files)} files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        name = getattr(error, "filename", None)
        raise DataError(
            f"{name or checkpoint} can't be read ({reason(error)}): verify it with fp8moe verify"
        ) from error
    return "\n".join([*lines, *(f"  {name:<28} {_amount(file.size):>10}" for name, file in files.items())])


def _numbers(state: dict[str, Any]) -> list[str]:
    from fp8moe.data.identity import short

    config, model = state.get("config", {}), state["model"]
    written = ", ".join(f"{name} {version}" for name, version in state.get("versions", {}).items())
    tokens = state["consumed"] * state["seq_len"]
    rows = {
        "step": f"{state['step']} of {config.get('steps', 'unknown')}, {state['updates']} updates, "
        f"{state['skipped']} skipped",
        "schedule": _schedule(state, config) if "optimizer" in config else "unknown",
        "samples": f"{state['consumed']}, {tokens:,} tokens of seq_len {state['seq_len']}, in the order of seed "
        f"{state['seed']}",
        "data": ", ".join(f"{name} {short(value)}" for name, value in (state.get("data") or {}).items()) or "unknown",
        "model": f"dim {model['dim']}, {model['num_layers']} layers, {model['experts']['num_experts']} experts, "
        f"vocabulary {model['vocab_size']}",
        "precision": config.get("precision", {}).get("mode", "unknown"),
        "settings": f"{sum(1 for _ in _leaves(config))} resolved keys" if config else "unknown",
        "processes": str(state.get("world_size", "unknown")),
        "written by": written or "unknown",
        "commit": state.get("commit") or "unknown",
    }
    return [f"  {name:<12} {value}" for name, value in rows.items()]


def _schedule(state: dict[str, Any], config: dict[str, Any]) -> str:
    """Where the run is in its schedule: it has no state but steps and samples, and gives the next learning rate."""
    from fp8moe.train.lr import LearningRateConfig, Progress, Segment, learning_rate

    stored = config["optimizer"]["schedule"]
    schedule = LearningRateConfig(**stored | {"phases": tuple(Segment(**phase) for phase in stored["phases"])})
    at = Progress(state["step"], config["steps"], state["consumed"] * state["seq_len"])
    return f"{state['step'] / config['steps']:.1%} of the steps, next learning rate {learning_rate(schedule, at):.3e}"


def _leaves(config: dict[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield key


def _kinds(index: dict[str, dict[str, Any]]) -> list[str]:
    totals: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for name, entry in index.items():
        total = totals[(name.partition(".")[0], entry["dtype"])]
        total[0] += 1
        total[1] += prod(entry["shape"])
    lines = [f"  {'kind':<12} {'dtype':<6} {'tensors':>8} {'values':>16} {'size':>10}"]
    for (kind, dtype), (tensors, values) in sorted(totals.items()):
        lines.append(f"  {kind:<12} {dtype:<6} {tensors:>8} {values:>16,} {_amount(values * BYTES[dtype]):>10}")
    return lines


def _amount(num_bytes: int) -> str:
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.2f} {unit}"
    return f"{num_bytes} B"
