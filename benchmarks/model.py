"""PREDICTION of the Hopper GEMMs' speed from their tiles, before any measurement; what a measurement is held against.

    python -m benchmarks.model [--sms 132 112] [--clock 1.59 1.82] [--multicast]

One persistent CTA an SM works through its tiles; a tile is ceil(K / 128) steps and an epilogue. In a step of BM x BN x
128 four units work side by side, and the slowest sets the pace (cycles of one SM):

    tensor core   BM * BN * 128 / 4096 multiply-adds a cycle
    promotion     BM * BN / 128 FP32 lanes, once (rows by blocks) or twice (columns: a product with b's scale first)
    shared memory what TMA writes, (BM + BN) * 128 bytes, and WGMMA reads, 192 * 128 a wave of 64x128; 128 B a cycle
    L2            (BM + BN) * 128 bytes at 32 B a cycle and SM; with multicast a pair of SMs reads its rows once

Promotion of one consumer hides under the tensor core's work for the other as long as one consumer's own chain, per wave
256 cycles of WGMMA, its latency and the promotion, is shorter than the step. The busiest SM has ceil(tiles / SMs)
tiles; the time is that of its tiles or of the bytes from HBM, whichever is longer, and a start. A clock is a range,
because a Hopper GPU at full load holds less than its boost clock.

What it leaves out: the order of tiles (L2 hits are taken for granted), HBM pages, the drift of the two consumers.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.shapes import DENSE, DENSE_WGRAD, GROUPED, GROUPED_WGRAD, Problem
from fp8moe.kernels.fp8 import ceil_div
from fp8moe.kernels.tiles import Tile, choose

MACS_PER_CYCLE = 4096  # FP8, one SM
FP32_LANES = 128
SHARED_BYTES_PER_CYCLE = 128
L2_BYTES_PER_CYCLE = 32  # one SM
HBM_BYTES_PER_SECOND = 4.2e12  # what a copy reaches on an H200
WGMMA_LATENCY = 60  # cycles from the last multiply-add of a wave to its first use
EPILOGUE_CYCLES = 700  # one wave of 64x128 a consumer: convert, store, and its part of a filling ring
START_SECONDS = 4e-6  # launch, descriptors, the first fill
FP8_PEAK = 1979e12


@dataclass(frozen=True)
class Step:
    """Cycles of each unit in one step of 128 along K."""

    tensor: float
    promotion: float
    shared: float
    l2: float
    chain: float  # of one consumer: its waves one after another

    @property
    def cycles(self) -> float:
        """The slowest unit's."""
        return max(self.tensor, self.promotion, self.shared, self.l2, self.chain)

    @property
    def bound(self) -> str:
        """Which unit that is."""
        units = {name: getattr(self, name) for name in ("tensor", "promotion", "shared", "l2", "chain")}
        return max(units, key=lambda name: units[name])


@dataclass(frozen=True)
class Prediction:
    """Of one problem with one tile on `sms` SMs at `clock` Hz; `waves` = tiles of the busiest SM."""

    step: Step
    tiles: int
    waves: int
    seconds: float
    tflops: float
    bytes: float
    bound: str


def step_of(block_m: int, block_n: int, kind: str, *, multicast: bool = False) -> Step:
    """Cycles of one step of a tile; kind as in `Problem`; multicast: a pair of CTAs reads its rows from L2 once."""
    waves = block_m * block_n / (64 * 128)
    operations = 2 if kind == "columns" else 1
    loaded = (block_m + block_n) * 128
    read = (block_m / (2 if multicast else 1) + block_n) * 128
    wave_tensor = 64 * 128 * 128 / MACS_PER_CYCLE
    wave_promotion = 64 * 128 / FP32_LANES * operations
    return Step(
        tensor=waves * wave_tensor,
        promotion=waves * wave_promotion,
        shared=(loaded + waves * (64 + 128) * 128) / SHARED_BYTES_PER_CYCLE,
        l2=read / L2_BYTES_PER_CYCLE,
        chain=waves / 2 * (wave_tensor + WGMMA_LATENCY + wave_promotion),
    )


def memory_bytes(problem: Problem) -> float:
    """Bytes that must cross HBM: codes and scales once, the output once (read and written in FP32 where added into)."""
    p = problem
    num_k = ceil_div(p.k, 128)
    codes = (p.m + p.n) * p.k
    scales = 4.0 * num_k * (p.m + (p.n if p.kind == "columns" else ceil_div(p.n, 128)))
    out = p.m * p.n * (8 if p.kind == "columns" else 2)
    return p.groups * (codes + scales + out)


def predict(problem: Problem, tile: Tile, sms: int, clock: float) -> Prediction:
    """Time and TFLOPS of `problem` with `tile` on `sms` SMs at `clock` Hz."""
    step = step_of(tile.block_m, tile.block_n, problem.kind, multicast=tile.multicast)
    pair = 2 if tile.multicast else 1
    programs = problem.groups * ceil_div(problem.m, tile.block_m) * ceil_div(problem.n, tile.block_n * pair)
    num_tiles, waves = programs * pair, ceil_div(programs, max(1, sms // pair))
    epilogue = tile.block_m * tile.block_n / (2 * 64 * 128) * EPILOGUE_CYCLES
    compute = waves * (ceil_div(problem.k, 128) * step.cycles + epilogue) / clock
    moved = memory_bytes(problem)
    memory = moved / HBM_BYTES_PER_SECOND
    seconds = max(compute, memory) + START_SECONDS
    bound = "hbm" if memory > compute else step.bound
    return Prediction(step, num_tiles, waves, seconds, problem.flops / seconds / 1e12, moved, bound)


def tile_of(problem: Problem) -> Tile:
    """The tile that the table chooses on a device without entries of its own."""
    return choose("gluon", problem.op, problem.m, problem.n, problem.k, groups=problem.groups)


def table(sms: Sequence[int], clocks: Sequence[float], *, multicast: bool = False) -> str:
    """Every problem of `shapes` with its production tile: a step's cycles, waves, and TFLOPS as a range of clocks."""
    head = ["op", "shape", "tile", "tensor", "promo", "shared", "L2", "bound", "GB"]
    head += [f"waves@{count}" for count in sms] + [f"TFLOPS@{count}" for count in sms] + ["of FP8 peak", "published"]
    rows = [head]
    for problem in (*DENSE, *DENSE_WGRAD, *GROUPED, *GROUPED_WGRAD):
        tile = replace(tile_of(problem), multicast=multicast)
        found = {count: [predict(problem, tile, count, clock * 1e9) for clock in clocks] for count in sms}
        first = found[sms[0]][0]
        step = first.step
        row = [problem.op, problem.label, f"{tile.block_m}x{tile.block_n}"]
        row += [f"{cycles:.0f}" for cycles in (step.tensor, step.promotion, step.shared, step.l2)]
        row += [first.bound, f"{first.bytes / 1e9:.2f}"]
        row += [f"{first.tiles / count:.2f}->{found[count][0].waves}" for count in sms]
        row += ["-".join(f"{p.tflops:.0f}" for p in (found[count][0], found[count][-1])) for count in sms]
        row += [f"{found[sms[0]][-1].tflops * 1e12 / FP8_PEAK:.0%}"]
        row += [f"{problem.published:.0f}" if problem.published else "-"]
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    pairs = ", multicast in pairs of SMs" if multicast else ""
    clock = f"clock {' to '.join(map(str, clocks))} GHz"
    title = f"PREDICTION, not a measurement{pairs}: {clock}; cycles are of one step of 128"
    return "\n".join([title, *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="predict the speed of the Hopper GEMMs from their tiles")
    parser.add_argument("--sms", type=int, nargs="+", default=[132, 112], help="SMs that compute (132 112)")
    parser.add_argument("--clock", type=float, nargs=2, default=[1.59, 1.82], metavar="GHZ", help="1.59 1.82")
    parser.add_argument("--multicast", action="store_true", help="pairs of SMs that share their rows")
    arguments = parser.parse_args(argv)
    if min(arguments.sms) < 1 or min(arguments.clock) <= 0:
        parser.error(f"--sms must be at least 1 and --clock above 0, got {arguments.sms} and {arguments.clock}")
    print(table(arguments.sms, arguments.clock, multicast=arguments.multicast))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
