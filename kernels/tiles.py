"""Which tile a kernel runs with: a table in a file, and the cheapest of its tiles by a small model of the machine.

`tiles.json` beside this file maps device -> back end -> op -> length of the contraction -> tiles to choose from. They
are few on purpose: a batch of another size takes another of tiles that are compiled already, and every tile adds
the same products in the same order, so the choice changes no bit. Among them `choose` takes the one whose busiest SM
has the least to do, in cycles by `cycles`; where two cost the same, a pair where pairs are allowed, else the first of
the table, which is the one measured to be faster. `benchmarks/tune.py` searches stages and order of tiles on a GPU and
rewrites the file. Autotuning inside training was refused: the first steps would time candidates, and ranks could choose
differently.

A device that has no entries of its own takes those of "default".

The model. A tile is ceil(K / 128) steps and an epilogue. In a step of BM x BN x 128 these units work side by side
(cycles of one SM; `Step`):

    tensor core    BM * BN * 128 / 4096 multiply-adds a cycle
    promotion      BM * BN / 128 FP32 lanes, once (rows by blocks) or twice (columns: a product with b's scale first)
    shared memory  what TMA writes, and what WGMMA reads, 192 * 128 bytes a wave of 64x128; 128 bytes a cycle
    chain          one consumer's waves one after another: 256 cycles of WGMMA each, its latency, the promotion
    L2             codes and scales at 52 bytes a cycle and SM
    gap            what comes on top of the slowest of the first four for each wave: consumers that are not in turns
                   multiply together and promote together (`gluon/consumers`); more where both operands have scales

The slowest of the first four and the gap are the consumers' pace. The producer is up to a ring ahead and keeps loading
under an epilogue, so a tile takes the longer of its loads and of its consumers' steps and epilogue. A sum into FP32
comes on top: most of its traffic hides under nothing. Constants are measured once for all sizes; `benchmarks/model.py`
holds them against every record.

Consumers in turns have the smaller gap and lose a while in each tile, until the second has its first turn: free ones
are faster at K = 512. Of two in ping-pong each has a tile to itself and hides its epilogue and its sum under the
other's steps; measured, they are no faster than turns, and no table has them.
"""

import functools
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fp8moe.kernels.fp8 import ceil_div

TABLE = Path(__file__).resolve().with_name("tiles.json")
DEFAULT_DEVICE = "default"
LENGTHS = ("short", "long")  # of the contraction: how many rows of tiles are best swept together depends on it
SHORT_CONTRACTION = 2048
ADDED_BY_TMA = SHORT_CONTRACTION + 1  # tokens of a group from which L2 adds; of fewer TMA fetches what is added to
HOPPER_SMS = 132
PAIR = 2  # CTAs of a cluster, side by side along the columns of the output

MACS_PER_CYCLE = 4096  # FP8, one SM
FP32_LANES = 128
SHARED_BYTES_PER_CYCLE = 128
L2_BYTES_PER_CYCLE = 52  # one SM, all loading: at 38 a profile says that L2 is busy 74 % (benchmarks/LOG.md)
BF16_BYTES_PER_CYCLE = 28.5  # one SM, in BF16 products: by this constant they take what PyTorch's took on an H100
WGMMA_LATENCY = 60  # from the last multiply-add of a wave to its first use
# Idle cycles of the tensor core for a wave of each consumer: with scales of one operand for each row, and of both.
GAPS = {"free": (110, 260), "turns": (60, 215), "pingpong": (60, 215)}
FIRST_TURN_CYCLES = 720  # of a tile whose consumers are in turns
EPILOGUE_CYCLES = 1700  # of one wave of 64x128: last product, conversion, store, barriers
UNQUANTIZED = ("wgrad", "grouped_mm_wgrad")  # ops of BF16 operands
SUMMED = ("gemm_columns", "grouped_wgrad", *UNQUANTIZED)  # ops that add into FP32
# For a value of a tile: HBM in and out by registers; added in L2 by TMA, or to what it has fetched (`gluon/epilogues`).
SUM_CYCLES, SUM_CYCLES_BY_TMA = 0.48, 0.38
CONSUMERS = ("free", "turns", "pingpong")  # how the two of a Gluon kernel share a program's work: `gluon/consumers`


@dataclass(frozen=True)
class Tile:
    """One configuration. `group` is how many rows of tiles are swept together, so that their operands stay in L2."""

    block_m: int
    block_n: int
    stages: int  # of the ring (Gluon) or of the software pipeline (Triton)
    group: int
    warps: int  # of one program; a Gluon kernel has 4 in each of two consumers and one that loads
    multicast: bool = False  # Gluon: a pair of CTAs side by side shares its rows; in the table only where it is true
    consumers: str = "free"  # Gluon: one of CONSUMERS; in the table only where it is another than "free"

    def __post_init__(self) -> None:
        """ValueError where no kernel can share the work so."""
        if self.consumers not in CONSUMERS:
            raise ValueError(f"consumers of a tile is one of {', '.join(CONSUMERS)}, got {self.consumers!r}")
        whole = (self.block_m, self.block_n, self.stages % 2, self.multicast) == (128, 128, 0, False)
        if self.consumers == "pingpong" and not whole:
            raise ValueError(
                "consumers in ping-pong need tiles of 128x128, an even number of stages and no multicast, got "
                f"{self.block_m}x{self.block_n}, {self.stages} stages, multicast {self.multicast}"
            )


@dataclass(frozen=True)
class Step:
    """Cycles of each unit in one step of 128 along K."""

    tensor: float
    promotion: float
    shared: float
    chain: float
    l2: float
    gap: float = 0.0

    @property
    def consumers(self) -> float:
        """The pace of the slowest unit that is not L2."""
        return max(self.tensor, self.promotion, self.shared, self.chain) + self.gap


def step_of(
    block_m: int,
    block_n: int,
    *,
    columns: bool,
    rows_shared: int = 1,
    columns_shared: int = 1,
    consumers: str = "free",
) -> Step:
    """One step of a tile of FP8; *_shared: how many CTAs read the tile's rows (columns) from L2 together.

    columns: both operands have scales by 1x128, which travel in the ring; else only the rows have.
    """
    width = min(block_n, 128)  # of a wave, 64 rows high
    waves = block_m / 64 * block_n / width
    wave_tensor = 64 * width * 128 / MACS_PER_CYCLE
    wave_promotion = 64 * width / FP32_LANES * (2 if columns else 1)
    row_bytes, column_bytes = block_m * (128 + 4), block_n * (128 + (4 if columns else 0))
    return Step(
        tensor=waves * wave_tensor,
        promotion=waves * wave_promotion,
        shared=((block_m + block_n) * 128 + waves * (64 + width) * 128) / SHARED_BYTES_PER_CYCLE,
        chain=waves / 2 * (wave_tensor + WGMMA_LATENCY + wave_promotion),
        l2=(row_bytes / rows_shared + column_bytes / columns_shared) / L2_BYTES_PER_CYCLE,
        gap=waves / 2 * GAPS[consumers][columns],
    )


def unquantized_step(block_m: int, block_n: int) -> Step:
    """One step of 128 of a tile of BF16: twice the bytes, half the multiply-adds a cycle, nothing to promote."""
    fp8 = step_of(block_m, block_n, columns=False)
    l2 = (block_m + block_n) * 256 / BF16_BYTES_PER_CYCLE
    return Step(tensor=2 * fp8.tensor, promotion=0.0, shared=2 * fp8.shared, chain=2 * fp8.tensor, l2=l2)


def tile_cycles(
    step: Step, block_m: int, block_n: int, k: int, *, summed: float = 0.0, consumers: str = "free"
) -> float:
    """A whole tile of contraction k, epilogue included; summed: cycles for each value that is added into FP32.

    In ping-pong, half of the time in which each of two consumers computes such a tile.
    """
    steps, waves = ceil_div(k, 128), block_m / 128 * max(1.0, block_n / 128)  # of each consumer
    added = block_m * block_n * summed
    if consumers == "pingpong":  # all waves of a tile one after another, and nothing that the other's steps don't hide
        alone = 2 * (steps * step.chain + waves * EPILOGUE_CYCLES) + added
        return max(steps * step.l2, steps * step.consumers, alone / 2, added)
    first = FIRST_TURN_CYCLES if consumers == "turns" else 0
    return max(steps * step.l2, steps * step.consumers + waves * EPILOGUE_CYCLES + first) + added


def cycles(tile: Tile, op: str, m: int, n: int, k: int, *, groups: int = 1, sms: int = HOPPER_SMS) -> float:
    """Of the busiest SM, where `tile` computes `op` on `sms` SMs (of a pair: an even number of them); pure."""
    pair = PAIR if tile.multicast else 1
    programs = groups * ceil_div(m, tile.block_m) * ceil_div(n, tile.block_n * pair)
    if op in UNQUANTIZED:
        step = unquantized_step(tile.block_m, tile.block_n)
    else:
        step = step_of(tile.block_m, tile.block_n, columns=op in SUMMED, rows_shared=pair, consumers=tile.consumers)
    by_tma = op not in UNQUANTIZED and not tile.multicast
    summed = (SUM_CYCLES_BY_TMA if by_tma else SUM_CYCLES) if op in SUMMED else 0.0
    one = tile_cycles(step, tile.block_m, tile.block_n, k, summed=summed, consumers=tile.consumers)
    return ceil_div(programs, sms // pair) * one


@functools.lru_cache(maxsize=4096)
def choose(
    backend: str,
    op: str,
    m: int,
    n: int,
    k: int,
    *,
    groups: int = 1,
    device: str = DEFAULT_DEVICE,
    sms: int = HOPPER_SMS,
    pairs: bool = False,
) -> Tile:
    """The cheapest tile of `op` ("gemm", "gemm_columns", "grouped_gemm", "grouped_wgrad", ...) in a back end; pure.

    m, n: the output's sizes, k: the contraction's (for grouped ops those of one group on average). `device` is the
    name the driver gives ("NVIDIA H200"), `sms` how many SMs the launch may take, `pairs` whether two CTAs may share
    their rows. Raises ValueError where the table has no such back end or op.
    """
    entries = _entries(read_table(), device, backend, op)
    pairs = pairs and sms >= PAIR
    # Where one CTA's columns are all there are, a pair would share its rows with nobody.
    legal = [one for one in entries[length_of(k)] if not one.multicast or (pairs and n > one.block_n)]
    # A pair that costs the same reads less: who allows pairs gets it.
    return min(legal, key=lambda tile: (cycles(tile, op, m, n, k, groups=groups, sms=sms), not tile.multicast))


def length_of(k: int) -> str:
    """Under which of LENGTHS the table has the tiles of a contraction of k."""
    return LENGTHS[k > SHORT_CONTRACTION]


def production_tiles(backend: str, op: str, *, pairs: bool = True) -> tuple[Tile, ...]:
    """Every different tile that can be chosen for `op`, on any device: what must compile without a spill."""
    found: dict[Tile, None] = {}
    for backends in read_table().values():
        for entries in backends.get(backend, {}).get(op, {}).values():
            found |= dict.fromkeys(Tile(**entry) for entry in entries)
    return tuple(tile for tile in found if pairs or not tile.multicast)


@functools.cache
def read_table(path: Path = TABLE) -> dict[str, Any]:
    """The table as it stands in the file."""
    table: dict[str, Any] = json.loads(path.read_text())
    return table


def write_table(table: dict[str, Any], path: Path = TABLE) -> None:
    """Write the table, a tile a line, so that a change of one tile is one line of a diff."""
    lines = ["{"]
    for d, (device, backends) in enumerate(table.items()):
        lines.append(f" {json.dumps(device)}: {{")
        for b, (backend, ops) in enumerate(backends.items()):
            lines.append(f"  {json.dumps(backend)}: {{")
            for o, (op, lengths) in enumerate(ops.items()):
                rows = ",\n".join(_rows(length, entries) for length, entries in lengths.items())
                lines.append(f"   {json.dumps(op)}: {{\n{rows}\n   }}{'' if o == len(ops) - 1 else ','}")
            lines.append("  }" + ("" if b == len(backends) - 1 else ","))
        lines.append(" }" + ("" if d == len(table) - 1 else ","))
    path.write_text("\n".join([*lines, "}"]) + "\n")
    read_table.cache_clear()
    choose.cache_clear()


def _rows(length: str, entries: list[dict[str, Any]]) -> str:
    tiles = ",\n".join(f"     {json.dumps(entry)}" for entry in entries)
    return f"    {json.dumps(length)}: [\n{tiles}\n    ]"


def as_entry(tile: Tile) -> dict[str, Any]:
    """A tile as the table stores it: without what is as in every tile that does not say so."""
    usual = {one.name: one.default for one in fields(Tile)}
    return {name: value for name, value in asdict(tile).items() if value != usual[name]}


def _entries(table: dict[str, Any], device: str, backend: str, op: str) -> dict[str, list[Tile]]:
    for name in (device, DEFAULT_DEVICE):
        entry = table.get(name, {}).get(backend, {}).get(op)
        if entry is not None:
            return {length: [Tile(**one) for one in tiles] for length, tiles in entry.items()}
    known = sorted(f"{b} {o}" for b, ops in table[DEFAULT_DEVICE].items() for o in ops)
    raise ValueError(f"tiles.json has no tiles for op {op!r} of back end {backend!r}: use one of {', '.join(known)}")
