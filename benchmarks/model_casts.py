"""PREDICTION of the casts' bandwidth on an H100 from what their compiled code executes, beside what was measured.

    python -m benchmarks.model_casts

`tests/ptx/counts.json` has, of each kernel's compiled code run on a CPU: a thread's instructions for each byte that
ordinary accesses load or store, and useful bytes over bytes of the sectors moved. Three limits follow, and the lowest
is the prediction:

    hbm       what a copy reaches, 2.96 TB/s
    issue     132 SMs that issue 2 warp instructions a cycle at 1.75 GHz, half of what four schedulers could
    sectors   28.5 bytes a cycle and SM between L2 and the SMs, as for the GEMMs

Both constants are the same for all kernels. A cast that loads its tile twice counts those bytes twice, where HBM moves
them once: COUNTED says how many bytes are counted for each one moved.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.model import HBM_BYTES_PER_SECOND, RESULTS
from fp8moe.kernels.tiles import HOPPER_SMS, L2_BYTES_PER_CYCLE

COUNTS = Path(__file__).resolve().parents[1] / "tests" / "ptx" / "counts.json"
CLOCK = 1.75e9
ISSUED_PER_CYCLE = 2.0
KERNELS = {
    "quantize_rows": "triton quantize_rows bf16 fp32scale tiles_kernel",
    "quantize_columns": "triton quantize_columns bf16 fp32scale tiles_kernel",
    "quantize_rows_and_columns": "triton quantize_rows_and_columns bf16 fp32scale tiles_kernel",
    "quantize_blocks": "triton quantize_blocks bf16 fp32scale blocks_kernel",
    "requantize_columns": "triton requantize_columns requantize_kernel",
    "pack_e5m6": "triton pack_e5m6 bf16 pack_kernel",
}
COUNTED = {"quantize_rows_and_columns": 6 / 4, "quantize_blocks": 6 / 4}
MISSES = {
    "pack_e5m6": "its three 4-byte stores a run each write a part of a sector, which no limit here charges for",
}


def limits(row: dict[str, float], counted: float = 1.0) -> dict[str, float]:
    """Bytes a second, of HBM's, by each limit; `counted` bytes of the counts for one that HBM moves."""
    sectors = 0.5 / row["loads"] + 0.5 / row["stores"]
    return {
        "hbm": HBM_BYTES_PER_SECOND["H100"],
        "issue": HOPPER_SMS * CLOCK * ISSUED_PER_CYCLE * 32 / (row["instructions"] * counted),
        "sectors": HOPPER_SMS * CLOCK * L2_BYTES_PER_CYCLE / (sectors * counted),
    }


def measured() -> dict[str, float]:
    """Cast -> bytes a second of the largest committed size on an H100."""
    records = json.loads((RESULTS / "quantize-h100.json").read_text())
    return {r["name"]: r["value"] * 1e9 for r in records if r["metric"] == "bandwidth"}


def rows() -> Iterator[tuple[str, str, float, float]]:
    """(cast, which limit is lowest, predicted, measured bytes a second)."""
    versions = json.loads(COUNTS.read_text())
    counts, found = versions[max(versions)], measured()
    for name, kernel in KERNELS.items():
        bounds = limits(counts[kernel], COUNTED.get(name, 1.0))
        bound = min(bounds, key=lambda one: bounds[one])
        yield name, bound, bounds[bound], found[name]


def main() -> int:
    """Print the table."""
    print("PREDICTION, GB/s on an H100, beside the committed records")
    for name, bound, predicted, record in rows():
        told = (
            f"{name:26} {bound:8} {predicted / 1e9:5.0f}  measured {record / 1e9:5.0f}  {predicted / record - 1:+.0%}"
        )
        print(told + (f"  {MISSES[name]}" if name in MISSES else ""))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
