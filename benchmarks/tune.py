"""Search the tiles of the GEMMs on this GPU and write the best into kernels/tiles.json under the GPU's name.

    python -m benchmarks.tune [--backend gluon] [--op gemm ...] [--dry-run]
    python -m benchmarks.tune --consumers free turns pingpong --dry-run     every order (`gluon/consumers`)

For short and for long contractions the table gets one tile of each shape, alone and in pairs: that whose stages and
swept rows have the smallest product of times (geometric mean) over the problems. Which shape a problem then takes is
the choice of `kernels/tiles.py`; the fastest comes first, for where two cost the same. Consumers in turns or in
ping-pong get into the table where they are the fastest. Every candidate's output is compared with the first one's, and
one that differs beyond rounding is not a candidate. The compile gate (`tests/kernels/test_sm90.py`) then compiles what
the table newly names: run it before committing the change.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.harness import measure
from benchmarks.peers import Operands, implementation
from benchmarks.shapes import DENSE, DENSE_WGRAD, GROUPED, GROUPED_WGRAD, Problem
from fp8moe.kernels import tiles
from fp8moe.kernels.tiles import CONSUMERS, LENGTHS, Tile, length_of
from tests.distance import calc_diff

TRIED = ("free", "turns")  # of CONSUMERS, where nothing else is asked for: ping-pong has been no faster
AGREEMENT = 5e-6  # calc_diff between two tiles' outputs: rounding to BF16, no more
SMALL = (
    Problem("gemm", 512, 2048, 7168),
    Problem("gemm", 512, 2048, 2048),
    Problem("gemm_columns", 512, 2048, 4096, "columns"),
    Problem("gemm_columns", 512, 2048, 2048, "columns"),
    Problem("gemm_columns", 7168, 2048, 2048, "columns"),
    Problem("grouped_gemm", 128, 1024, 7168, groups=4),
    Problem("grouped_gemm", 128, 1024, 2048, groups=4),
    Problem("grouped_wgrad", 512, 1024, 2048, "columns", groups=4),
    Problem("grouped_wgrad", 512, 1024, 4096, "columns", groups=4),
    Problem("grouped_wgrad", 2048, 7168, 2048, "columns", groups=4),
)
PROBLEMS = (*DENSE, *DENSE_WGRAD, *GROUPED, *GROUPED_WGRAD, *SMALL)
# What the table of tiles calls an op -> where a back end has it, and its name there.
OPS = {
    "gemm": ("gemm", "gemm"),
    "gemm_columns": ("gemm", "gemm"),
    "grouped_gemm": ("grouped_gemm", "grouped_gemm"),
    "grouped_wgrad": ("grouped_gemm", "grouped_wgrad"),
}


def candidates(backend: str, op: str, consumers: Sequence[str] = TRIED) -> Iterator[Tile]:
    """Tiles worth trying: those whose ring fits an SM, by tile shape, stages, swept rows and order of the consumers."""
    if backend == "triton":
        for stages in (3, 4, 5):
            for group in (4, 8, 16):
                yield Tile(128, 128, stages, group, 8)
        return
    for block_m, block_n, deepest in ((256, 128, 4), (128, 256, 4), (128, 128, 6)):
        if op == "grouped_gemm" and block_m > 128:
            continue
        for stages in (deepest, deepest - 1):
            for group in (4, 8, 16, 32):
                for order, pair in itertools.product(consumers, (False, True)):
                    whole = (block_m, block_n, stages % 2, pair) == (128, 128, 0, False)
                    if order != "pingpong" or whole:
                        yield Tile(block_m, block_n, stages, group, 4, pair, order)


def call_of(backend: str, p: Problem, x: Operands, total: Tensor | None) -> Callable[[], Tensor]:
    """The op on problem `p`; what it returns is its output."""
    op = implementation(backend, *OPS[p.op])
    if p.op == "gemm":
        return lambda: op(x.a, x.b)
    if p.op == "grouped_gemm":
        return lambda: op(x.a, x.b, x.offsets)
    assert total is not None
    if p.op == "gemm_columns":
        return lambda: op(x.a, x.b, accumulate=total)

    def add() -> Tensor:
        op(x.a, x.b, x.offsets, total)
        return total

    return add


def times_of(
    backend: str, p: Problem, device: torch.device, repeats: int, consumers: Sequence[str]
) -> dict[Tile, float]:
    """Median seconds of every candidate that computes the same."""
    x = Operands.make(p, device)
    shape = (p.groups, p.m, p.n) if p.groups > 1 else (p.m, p.n)
    total = torch.zeros(shape, device=device) if p.kind == "columns" else None
    call = call_of(backend, p, x, total)
    first, seconds = None, {}
    for tile in candidates(backend, p.op, consumers):
        if tile.consumers == "pingpong" and length_of(p.k) == "long":
            continue
        with patch.object(tiles, "choose", lambda *_, tile=tile, **__: tile):
            if total is not None:
                total.zero_()
            try:
                out = call().clone().flatten(0, -2)
            except ValueError as refused:  # multicast on an older Triton
                print(f"{backend} {p.op} {p.label} {tile}: {refused}")
                continue
            first = out if first is None else first
            if calc_diff(out, first) > AGREEMENT:
                print(f"{backend} {p.op} {p.label} {tile}: another result, left out")
                continue
            seconds[tile] = measure(call, device, repeats=repeats, warmup=2).median
    return seconds


def best(times: Sequence[dict[Tile, float]]) -> list[Tile]:
    """Of each shape, alone and in pairs, the tile of the smallest geometric mean, fastest first.

    Those whose consumers have an order are apart, and in it only where no tile without is faster.
    """
    common = set.intersection(*(set(one) for one in times))
    if not common:
        raise ValueError("no tile computed every problem of a length alike: the kernels need a look before tuning")

    def cost(tile: Tile) -> tuple[float, int, int]:
        return math.prod(one[tile] for one in times), tile.stages, tile.group

    def kind(tile: Tile) -> Tile:
        return replace(tile, stages=0, group=0)

    kinds = {kind(tile) for tile in common}
    found = sorted((min((t for t in common if kind(t) == one), key=cost) for one in kinds), key=cost)
    first_free = next((i for i, tile in enumerate(found) if tile.consumers == "free"), len(found))
    return [tile for i, tile in enumerate(found) if i <= first_free or tile.consumers == "free"]


def tune(
    backend: str, op: str, device: torch.device, repeats: int, consumers: Sequence[str] = TRIED
) -> dict[str, list[Tile]]:
    """Length of the contraction -> best tiles of `op`."""
    found = {}
    for length in LENGTHS:
        problems = [p for p in PROBLEMS if p.op == op and length_of(p.k) == length]
        found[length] = best([times_of(backend, p, device, repeats, consumers) for p in problems])
        print(f"{backend} {op} {length}: {found[length]}", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Search, and write the table unless --dry-run."""
    parser = argparse.ArgumentParser(description="search GEMM tiles on this GPU and rewrite kernels/tiles.json")
    parser.add_argument("--backend", choices=("gluon", "triton"), default="gluon", help="(gluon)")
    parser.add_argument("--op", choices=tuple(OPS), nargs="+", default=list(OPS), help="(all)")
    parser.add_argument(
        "--consumers",
        choices=CONSUMERS,
        nargs="+",
        default=TRIED,
        help="how a Gluon kernel's two share work (free turns)",
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of a candidate (15)")
    parser.add_argument("--dry-run", action="store_true", help="print, and leave the table as it is")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {arguments.repeats}")
    if not torch.cuda.is_available():
        parser.error("tuning times kernels on a GPU and torch sees 0: run it on the machine that trains")
    device = torch.device("cuda")
    table = dict(tiles.read_table())
    own = table.setdefault(torch.cuda.get_device_name(device), {}).setdefault(arguments.backend, {})
    for op in arguments.op:
        found = tune(arguments.backend, op, device, arguments.repeats, arguments.consumers)
        own[op] = {length: [tiles.as_entry(tile) for tile in them] for length, them in found.items()}
        if not arguments.dry_run:
            tiles.write_table(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
