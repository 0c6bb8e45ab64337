"""PREDICTION of the Hopper GEMMs' speed from their tiles, beside what was measured and beside DeepGEMM's.

    python -m benchmarks.model [--sms 132]     of casts: benchmarks.model_casts

Cycles are those of `fp8moe.kernels.tiles`, by which the back end chooses a tile; its docstring says what they are made
of. What turns them into time:

    clock     at full power (700 W) the clock falls with the share of its cycles that the tensor core works:
              2.026 - 0.4 * share GHz, at most 1.98. Of two points: 1.79 GHz at 0.59 (ours, an H100, L2-bound) and 1.67
              at 0.89 (DeepGEMM's longest contraction, an H800, which is an H100 with slower NVLink)
    memory    bytes that must cross HBM at what a copy reaches, 2.96 TB/s on an H100 and H800, 4.2 on an H200. Under a
              product they hide; a sum by registers hides a quarter of the shorter of the two phases
    start     4 microseconds: launch, descriptors, the first loads

Constants are the same for every size. What it leaves out: L2 misses (operands once in L2 are taken to stay there), the
drift of SMs, temperature. Of the 14 records of an H100 the farthest from its prediction is 15 % off: the longest
contraction of a weight gradient, where each of these must weigh most.

DeepGEMM is predicted from the tiles that its public heuristic chooses for these sizes (deep_gemm/jit_kernels/gemm.py
of its repository at the time of its pull request 86), so that the model is tested on a kernel that shares by multicast.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shapes import DENSE, DENSE_WGRAD, GROUPED, GROUPED_WGRAD, Problem
from fp8moe.kernels.fp8 import ceil_div
from fp8moe.kernels.tiles import (
    ADDED_BY_TMA,
    HOPPER_SMS,
    MACS_PER_CYCLE,
    SUM_CYCLES_BY_TMA,
    SUMMED,
    Step,
    Tile,
    choose,
    step_of,
    tile_cycles,
)

HBM_BYTES_PER_SECOND = {"H100": 2.96e12, "H200": 4.2e12}  # an H800 is an H100 here
CLOCK, CLOCK_PER_SHARE, FASTEST_CLOCK = 2.026e9, 0.4e9, 1.98e9
NOT_HIDDEN = 0.75  # of the shorter of a sum's two phases, multiplying and adding through HBM
START_SECONDS = 4e-6
FP8_PEAK = 1979e12
PROBLEMS = (*DENSE, *DENSE_WGRAD, *GROUPED, *GROUPED_WGRAD)
RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Work:
    """How a kernel divides a problem: tiles, who shares them, and how many SMs it takes."""

    block_m: int
    block_n: int
    rows_shared: int = 1
    columns_shared: int = 1
    sms: int = HOPPER_SMS


@dataclass(frozen=True)
class Prediction:
    """Of one problem; `waves` = tiles of the busiest SM, `share` = of its cycles, those of the tensor core."""

    step: Step
    waves: int
    share: float
    clock: float
    seconds: float
    tflops: float
    bound: str


# DeepGEMM's tiles for the sizes it has published (block M, block N, CTAs that share the rows, the columns), on the
# fewest SMs that need no further round, as it launches them.
DEEPGEMM = {
    "gemm M4096 N7168 K16384": Work(256, 128, 2, sms=128),
    "gemm M4096 N4096 K7168": Work(256, 128, 2, sms=128),
    "gemm M4096 N24576 K1536": Work(256, 128, 2, sms=128),
    "gemm M4096 N7168 K2048": Work(256, 128, 2, sms=128),
    "gemm M4096 N32768 K512": Work(256, 128, 2, sms=128),
    "gemm M4096 N2112 K7168": Work(256, 88, 2, sms=128),
    "gemm_columns M7168 N16384 K4096": Work(128, 152, 1, 2),
    "grouped_gemm E4 M8192 N4096 K7168": Work(128, 160, 1, 2),
    "grouped_gemm E4 M8192 N7168 K2048": Work(128, 160, 1, 2),
    "grouped_wgrad E4 M7168 N4096 K8192": Work(128, 152, 1, 2, sms=126),
}


def memory_bytes(problem: Problem) -> float:
    """Bytes that must cross HBM: codes and scales once, the output once (read and written in FP32 where added into)."""
    p = problem
    num_k = ceil_div(p.k, 128)
    codes = (p.m + p.n) * p.k
    scales = 4.0 * num_k * (p.m + (p.n if p.kind == "columns" else ceil_div(p.n, 128)))
    out = p.m * p.n * (8 if p.kind == "columns" else 2)
    return p.groups * (codes + scales + out)


def predict(problem: Problem, work: Work, *, device: str = "H100") -> Prediction:
    """Time and TFLOPS of `problem`, divided as `work` says, on a `device`."""
    p, sms, summed = problem, work.sms, problem.op in SUMMED
    # TMA adds in L2 for one CTA alone; DeepGEMM adds so always.
    by_tma = summed and p.k >= ADDED_BY_TMA and work.rows_shared == 1
    step = step_of(
        work.block_m,
        work.block_n,
        columns=p.kind == "columns",
        rows_shared=work.rows_shared,
        columns_shared=work.columns_shared,
    )
    pair = max(work.rows_shared, work.columns_shared)
    blocks = (work.block_m * work.columns_shared, work.block_n * work.rows_shared)
    programs = p.groups * ceil_div(p.m, blocks[0]) * ceil_div(p.n, blocks[1])
    waves = ceil_div(programs, sms // pair)
    one = tile_cycles(step, work.block_m, work.block_n, p.k, summed=SUM_CYCLES_BY_TMA if by_tma else 0.0)
    steps = ceil_div(p.k, 128)
    share = p.flops / 2 / MACS_PER_CYCLE / sms / (waves * one)
    clock = min(FASTEST_CLOCK, CLOCK - CLOCK_PER_SHARE * share)
    compute, memory = waves * one / clock, memory_bytes(p) / HBM_BYTES_PER_SECOND[device]
    seconds = max(compute, memory)
    if summed and not by_tma:
        seconds += NOT_HIDDEN * min(compute, memory)
    units = {name: getattr(step, name) for name in ("tensor", "promotion", "shared", "chain")}
    loads = steps * step.l2 >= one - (SUM_CYCLES_BY_TMA * work.block_m * work.block_n if by_tma else 0.0)
    bound = "hbm" if memory > compute else "l2" if loads else max(units, key=lambda name: units[name])
    seconds += START_SECONDS
    return Prediction(step, waves, share, clock, seconds, p.flops / seconds / 1e12, bound)


def work_of(problem: Problem, *, pairs: bool, sms: int = HOPPER_SMS) -> tuple[Work, Tile]:
    """What the back end does of `problem`, with pairs of CTAs or without."""
    p = problem
    tile = choose("gluon", p.op, p.m, p.n, p.k, groups=p.groups, sms=sms, pairs=pairs)
    return Work(tile.block_m, tile.block_n, 2 if tile.multicast else 1, sms=sms), tile


def measured(name: str = "gluon") -> dict[str, float]:
    """ "op label" -> TFLOPS of candidate `name` in the committed records of an H100."""
    found = {}
    for path in sorted(RESULTS.glob("*-h100.json")):
        for record in json.loads(path.read_text()):
            op, _, candidate = record["name"].partition(" ")
            if record["metric"] == "throughput" and candidate == name:
                found[f"{op} {record['shape']}"] = record["value"]
    return found


def rows(sms: int = HOPPER_SMS) -> Iterator[dict[str, str]]:
    """The table, a problem a row."""
    records, cublas = measured(), measured("cublas")
    for p in PROBLEMS:
        key = f"{p.op} {p.label}"
        alone, pair = (work_of(p, pairs=pairs, sms=sms) for pairs in (False, True))
        h100, paired = (predict(p, work) for work, _ in (alone, pair))
        h200, paired200 = (predict(p, work, device="H200") for work, _ in (alone, pair))
        row = {"op": p.op, "shape": p.label, "tile": _named(alone[1]), "waves": str(h100.waves), "bound": h100.bound}
        row |= {"H100": f"{h100.tflops:.0f}", "H200": f"{h200.tflops:.0f}"}
        row |= {"pair's tile": _named(pair[1]), "bound ": paired.bound, "H100 ": f"{paired.tflops:.0f}"}
        row |= {"H200 ": f"{paired200.tflops:.0f}", "of peak": f"{paired.tflops * 1e12 / FP8_PEAK:.0%}"}
        row |= {"measured": _beside(records.get(key), h100.tflops), "cuBLASLt": _beside(cublas.get(key), None)}
        deepgemm = predict(p, DEEPGEMM[key]).tflops if key in DEEPGEMM else None
        row |= {"DeepGEMM": _beside(p.published, deepgemm)}
        yield row


def _named(tile: Tile) -> str:
    return f"{tile.block_m}x{tile.block_n}" + (" pair" if tile.multicast else "")


def _beside(figure: float | None, predicted: float | None) -> str:
    """A figure, and in brackets its prediction and how far that is off."""
    if figure is None:
        return "-"
    if predicted is None:
        return f"{figure:.0f}"
    return f"{figure:.0f} ({predicted:.0f}, {predicted / figure - 1:+.0%})"


def table(sms: int = HOPPER_SMS) -> str:
    """Every problem of `shapes`: tiles, what binds, TFLOPS without pairs and with, and what was measured."""
    found = list(rows(sms))
    cells = [list(found[0]), *(list(row.values()) for row in found)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
    title = (
        f"PREDICTION, TFLOPS on {sms} SMs without pairs of CTAs and with; in brackets: that of a measured figure.\n"
        "measured, cuBLASLt: an H100 (benchmarks/results). DeepGEMM: an H800, its README of April 2025 and its pull "
        "requests 74 and 86."
    )
    return "\n".join([title, *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="predict the speed of the Hopper GEMMs from their tiles")
    parser.add_argument("--sms", type=int, default=HOPPER_SMS, help="SMs that compute (132)")
    arguments = parser.parse_args(argv)
    if arguments.sms < 2:
        parser.error(f"--sms must be at least 2, a pair's, got {arguments.sms}")
    print(table(arguments.sms))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
