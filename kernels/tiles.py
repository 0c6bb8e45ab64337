"""Which tile a kernel runs with: a table in a file, read by a pure function.

`tiles.json` beside this file maps device -> back end -> op -> shape class -> tile. The classes are few on purpose: a
tile is chosen by what changes the answer, how many tiles there are to share among the SMs and how long each one's
contraction is, so that a batch of another length never compiles a new kernel in the middle of a run.
`benchmarks/tune.py` searches on a GPU and rewrites the file. Autotuning inside training was refused: the first steps
would time candidates, ranks could choose differently, and sums would associate differently from run to run.

A device that has no entries of its own takes those of "default".
"""

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fp8moe.kernels.fp8 import ceil_div

TABLE = Path(__file__).resolve().with_name("tiles.json")
DEFAULT_DEVICE = "default"
CLASSES = ("few_short", "few_long", "many_short", "many_long")
SHORT_CONTRACTION = 2048
HOPPER_SMS = 132


@dataclass(frozen=True)
class Tile:
    """One configuration. `group` is how many rows of tiles are swept together, so that their operands stay in L2."""

    block_m: int
    block_n: int
    stages: int  # of the ring (Gluon) or of the software pipeline (Triton)
    group: int
    warps: int  # of one program; a Gluon kernel has 4 in each of two consumers and one that loads
    multicast: bool = False  # Gluon: two CTAs side by side share their rows; in the table only where it is true


def shape_class(m: int, n: int, k: int, groups: int = 1) -> str:
    """The class of a product [M, K] x [N, K] summed over K, `groups` of them where each has its own output.

    "few" where 256x128 tiles would not give every SM of a Hopper GPU one; "short" where K is at most 2048.
    """
    num_tiles = groups * ceil_div(m, 256) * ceil_div(n, 128)
    amount = "few" if num_tiles < HOPPER_SMS else "many"
    return f"{amount}_{'short' if k <= SHORT_CONTRACTION else 'long'}"


def choose(backend: str, op: str, m: int, n: int, k: int, *, groups: int = 1, device: str = DEFAULT_DEVICE) -> Tile:
    """The tile of `op` ("gemm", "gemm_columns", "grouped_gemm", "grouped_wgrad", ...) in a back end; pure.

    m, n: the output's sizes, k: the contraction's (for grouped ops those of one group on average). `device` is the
    name the driver gives ("NVIDIA H200"). Raises ValueError where the table has no such back end or op.
    """
    table = read_table()
    ops = _entries(table, device, backend, op)
    return Tile(**ops[shape_class(m, n, k, groups)])


def production_tiles(backend: str, op: str) -> tuple[Tile, ...]:
    """Every different tile that the table can choose for `op`, on any device: what must compile without a spill."""
    found: dict[Tile, None] = {}
    for backends in read_table().values():
        for entry in backends.get(backend, {}).get(op, {}).values():
            found[Tile(**entry)] = None
    return tuple(found)


@functools.cache
def read_table(path: Path = TABLE) -> dict[str, Any]:
    """The table as it stands in the file."""
    table: dict[str, Any] = json.loads(path.read_text())
    return table


def write_table(table: dict[str, Any], path: Path = TABLE) -> None:
    """Write the table, a class a line, so that a change of one tile is one line of a diff."""
    lines = ["{"]
    for d, (device, backends) in enumerate(table.items()):
        lines.append(f" {json.dumps(device)}: {{")
        for b, (backend, ops) in enumerate(backends.items()):
            lines.append(f"  {json.dumps(backend)}: {{")
            for o, (op, classes) in enumerate(ops.items()):
                rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(tile)}" for name, tile in classes.items())
                lines.append(f"   {json.dumps(op)}: {{\n{rows}\n   }}{'' if o == len(ops) - 1 else ','}")
            lines.append("  }" + ("" if b == len(backends) - 1 else ","))
        lines.append(" }" + ("" if d == len(table) - 1 else ","))
    path.write_text("\n".join([*lines, "}"]) + "\n")
    read_table.cache_clear()


def as_entry(tile: Tile) -> dict[str, int]:
    """A tile as the table stores it."""
    return {name: value for name, value in asdict(tile).items() if name != "multicast" or value}


def _entries(table: dict[str, Any], device: str, backend: str, op: str) -> dict[str, Any]:
    for name in (device, DEFAULT_DEVICE):
        entry = table.get(name, {}).get(backend, {}).get(op)
        if entry is not None:
            return dict(entry)
    known = sorted(f"{b} {o}" for b, ops in table[DEFAULT_DEVICE].items() for o in ops)
    raise ValueError(f"tiles.json has no tiles for op {op!r} of back end {backend!r}: use one of {', '.join(known)}")
