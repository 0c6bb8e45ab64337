"""PREDICTION of the casts' bandwidth on an H100 from what their compiled code executes, beside what was measured.

    python -m benchmarks.model_casts

`tests/ptx/counts.json` has, of each kernel's compiled code run on a CPU, a thread's instructions for each byte that
ordinary accesses load or store, and useful bytes over bytes of the sectors moved. Three limits follow:

    hbm       what a copy reaches, 2.96 TB/s
    issue     132 SMs that issue 2.4 instructions of PTX a cycle at 1.75 GHz, of the four that their schedulers could
    partial   58e9 sectors a second of which a store writes a part, and which must be read first

They overlap, though not wholly: time is the fourth root of the sum of the limits' fourth powers. The constants are the
same for all kernels. A cast that loads its tile twice counts those bytes twice, where HBM moves them once: COUNTED says
how many bytes are counted for each one moved.

The records measured older code of some kernels. RECORDED has the counts of the code that was measured, by which the
model is tested; its rate of partial sectors comes from the only kernel that ever wrote them, and is not tested.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.model import HBM_BYTES_PER_SECOND, RESULTS
from fp8moe.kernels.tiles import HOPPER_SMS

COUNTS = Path(__file__).resolve().parents[1] / "tests" / "ptx" / "counts.json"
CLOCK = 1.75e9
ISSUED_PER_CYCLE = 2.4
PARTIAL_PER_SECOND = 58e9
SECTOR = 32
KERNELS = {
    "quantize_rows": "triton quantize_rows bf16 fp32scale tiles_kernel",
    "quantize_columns": "triton quantize_columns bf16 fp32scale tiles_kernel",
    "quantize_rows_and_columns": "triton quantize_rows_and_columns bf16 fp32scale tiles_kernel",
    "quantize_blocks": "triton quantize_blocks bf16 fp32scale blocks_kernel",
    "requantize_columns": "triton requantize_columns requantize_kernel",
    "pack_e5m6": "triton pack_e5m6 bf16 pack_kernel",
    "e5m6_to_columns": "triton e5m6 e5m6_columns_kernel",
}
COUNTED = {"quantize_rows_and_columns": 6 / 4, "quantize_blocks": 6 / 4}
STORED = {"pack_e5m6": 1.5 / 3.5}  # of its bytes, where that is not needed of others: they store whole sectors


@dataclass(frozen=True)
class Counted:
    """Of compiled code: instructions of a thread a byte of HBM, and useful bytes over bytes of sectors stored."""

    instructions: float
    stores: float = 1.0


RECORDED = {  # as Triton 3.6 compiled it
    "quantize_rows": Counted(2.825),
    "quantize_columns": Counted(4.54),
    "quantize_rows_and_columns": Counted(5.08),
    "quantize_blocks": Counted(3.76),
    "requantize_columns": Counted(9.83),
    "pack_e5m6": Counted(8.64, 0.127),
    "e5m6_to_columns": Counted(13.15),
}


def limits(code: Counted, stored: float = 0.5) -> dict[str, float]:
    """Bytes a second by each limit; `stored` is the share of the bytes that are stored."""
    bounds = {
        "hbm": HBM_BYTES_PER_SECOND["H100"],
        "issue": HOPPER_SMS * CLOCK * ISSUED_PER_CYCLE * 32 / code.instructions,
    }
    if code.stores < 0.9:  # else nearly every sector is written whole
        bounds["partial"] = PARTIAL_PER_SECOND * SECTOR * code.stores / stored
    return bounds


def together(bounds: dict[str, float]) -> float:
    """Bytes a second under limits that overlap in part."""
    return float(sum(bound**-4 for bound in bounds.values()) ** -0.25)


def predict(name: str, code: Counted) -> float:
    """Bytes a second of a cast."""
    return together(limits(code, STORED.get(name, 0.5)))


def measured() -> dict[str, float]:
    """Cast -> bytes a second of the largest committed size on an H100."""
    records = json.loads((RESULTS / "quantize-h100.json").read_text())
    return {r["name"]: r["value"] * 1e9 for r in records if r["metric"] == "bandwidth"}


def present() -> dict[str, Counted]:
    """What today's code executes, of the newest Triton that counts are committed of."""
    versions = json.loads(COUNTS.read_text())
    table = versions[max(versions)]
    return {
        name: Counted(table[kernel]["instructions"] * COUNTED.get(name, 1.0), table[kernel]["stores"])
        for name, kernel in KERNELS.items()
    }


def rows() -> Iterator[tuple[str, float, float, float]]:
    """(cast, bytes a second predicted of the code that was measured, measured, predicted of today's)."""
    found, code = measured(), present()
    for name in KERNELS:
        yield name, predict(name, RECORDED[name]), found[name], predict(name, code[name])


def main() -> int:
    """Print the table."""
    copy = HBM_BYTES_PER_SECOND["H100"]
    print("PREDICTION, GB/s on an H100: of the code that the committed records measured, and of today's")
    for name, then, record, now in rows():
        print(
            f"{name:26} {then / 1e9:5.0f}  measured {record / 1e9:5.0f}  {then / record - 1:+4.0%}   "
            f"today {now / 1e9:5.0f}, {now / copy:.2f} of a copy"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
