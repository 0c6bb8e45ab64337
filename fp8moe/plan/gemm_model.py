"""Speed of the Hopper GEMMs, predicted from their tiles.

Cycles are those of `fp8moe.kernels.tiles`, by which the back end chooses a tile; its docstring says what they are made
of. What turns them into time:

    clock     at full power (700 W) the clock falls with the share of its cycles that the tensor core works:
              2.026 - 0.4 * share GHz, at most 1.98. Of two points: 1.79 GHz at 0.59 (ours, an H100) and 1.67 at 0.89
              (DeepGEMM's longest contraction, an H800, which is an H100 with slower NVLink)
    memory    bytes that must cross HBM at what a copy reaches, 2.96 TB/s on an H100 and H800, 4.2 on an H200. Under a
              product they hide; a sum by registers hides a quarter of the shorter of the two phases, one that is
              added to what TMA has fetched 0.6 of it
    start     4 microseconds: launch, descriptors, the first loads

Constants are the same for every size. What it leaves out: L2 misses (operands once in L2 are taken to stay there), the
drift of SMs, temperature, and how far power lets the clock fall in a run of long products. Of the 14 records of an H100
those farthest from their predictions are 13 % off: a weight gradient of 8,192 tokens, and N2112, measured before
128x128 tiles took turns. `benchmarks/model.py` prints all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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

HBM_BYTES_PER_SECOND = {"H100": 2.96e12, "H800": 2.96e12, "H200": 4.2e12}
CLOCK, CLOCK_PER_SHARE, FASTEST_CLOCK = 2.026e9, 0.4e9, 1.98e9
# Of the shorter of a sum's two phases, multiplying and adding through HBM: by registers, to what TMA has fetched.
NOT_HIDDEN, NOT_HIDDEN_FETCHED = 0.75, 0.4
START_SECONDS = 4e-6

Kind = Literal["rows", "columns"]


@dataclass(frozen=True)
class Problem:
    """`groups` products of [M, K] by [N, K]. kind "rows": 1x128 by 128x128 scales, BF16 out (Fprop, Dgrad; M is the
    rows of one group); "columns": both 1x128 along K, added into FP32 (Wgrad; K is the tokens of one group)."""

    op: str
    m: int
    n: int
    k: int
    kind: Kind = "rows"
    groups: int = 1
    published: float | None = None

    @property
    def flops(self) -> float:
        """Multiply-adds counted as two."""
        return 2.0 * self.groups * self.m * self.n * self.k

    @property
    def label(self) -> str:
        """The size in words a reader can repeat."""
        size = f"M{self.m} N{self.n} K{self.k}"
        return size if self.groups == 1 else f"E{self.groups} {size}"


@dataclass(frozen=True)
class Work:
    """How a kernel divides a problem: tiles, who shares them, and how many SMs it takes."""

    block_m: int
    block_n: int
    rows_shared: int = 1
    columns_shared: int = 1
    sms: int = HOPPER_SMS
    consumers: str = "free"  # as of a `Tile`


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
        consumers=work.consumers,
    )
    pair = max(work.rows_shared, work.columns_shared)
    blocks = (work.block_m * work.columns_shared, work.block_n * work.rows_shared)
    programs = p.groups * ceil_div(p.m, blocks[0]) * ceil_div(p.n, blocks[1])
    waves = ceil_div(programs, sms // pair)
    by_l2 = SUM_CYCLES_BY_TMA if by_tma else 0.0
    one = tile_cycles(step, work.block_m, work.block_n, p.k, summed=by_l2, consumers=work.consumers)
    steps = ceil_div(p.k, 128)
    share = p.flops / 2 / MACS_PER_CYCLE / sms / (waves * one)
    clock = min(FASTEST_CLOCK, CLOCK - CLOCK_PER_SHARE * share)
    compute, memory = waves * one / clock, memory_bytes(p) / HBM_BYTES_PER_SECOND[device]
    seconds = max(compute, memory)
    if summed and not by_tma:
        seconds += (NOT_HIDDEN_FETCHED if pair == 1 else NOT_HIDDEN) * min(compute, memory)
    units = {name: getattr(step, name) for name in ("tensor", "promotion", "shared", "chain")}
    loads = steps * step.l2 >= one - by_l2 * work.block_m * work.block_n
    bound = "hbm" if memory > compute else "l2" if loads else max(units, key=lambda name: units[name])
    seconds += START_SECONDS
    return Prediction(step, waves, share, clock, seconds, p.flops / seconds / 1e12, bound)


def work_of(problem: Problem, *, pairs: bool, sms: int = HOPPER_SMS) -> tuple[Work, Tile]:
    """What the back end does of `problem`, with pairs of CTAs or without."""
    p = problem
    tile = choose("gluon", p.op, p.m, p.n, p.k, groups=p.groups, sms=sms, pairs=pairs)
    return Work(tile.block_m, tile.block_n, 2 if tile.multicast else 1, sms=sms, consumers=tile.consumers), tile
