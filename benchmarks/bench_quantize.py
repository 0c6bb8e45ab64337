"""Casts to FP8: bytes read and written a second, beside a plain copy of the same tensor in the same run.

    python -m benchmarks.bench_quantize [--quick] [--json FILE]

A cast reads BF16 and writes codes and scales, once or twice (rows and columns; a weight and its transpose); copy
bandwidth is what HBM gives anybody. The ratio is the cast's bytes a second over the copy's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.bandwidth import COPY, Entry, add_bandwidths, size_of
from benchmarks.contest import write_beside
from benchmarks.harness import Report, make_parser, parse_arguments
from benchmarks.shapes import CASTS
from fp8moe.kernels.e5m6 import e5m6_to_columns, pack_e5m6
from fp8moe.kernels.quantize import (
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    quantize_rows_and_columns,
    requantize_columns,
)

SUBJECT = "Casts to FP8"


def casts(x: Tensor) -> dict[str, Entry]:
    """Name -> (call, bytes it must read and write) for x [M, K] BF16."""
    rows, packed = quantize_rows(x, power_of_two=True), pack_e5m6(x)
    wide, narrow, small = size_of(x), size_of(rows), size_of(packed)
    return {
        COPY: (lambda: x.clone(), 2 * wide),
        "quantize_rows": (lambda: quantize_rows(x), wide + narrow),
        "quantize_columns": (lambda: quantize_columns(x), wide + narrow),
        "quantize_rows_and_columns": (lambda: quantize_rows_and_columns(x), wide + 2 * narrow),
        "quantize_blocks": (lambda: quantize_blocks(x), wide + 2 * x.numel()),
        "requantize_columns": (lambda: requantize_columns(rows), 2 * narrow),
        "pack_e5m6": (lambda: pack_e5m6(x), wide + small),
        "e5m6_to_columns": (lambda: e5m6_to_columns(packed), small + narrow),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0 also where there is no GPU and so nothing to measure (it says so)."""
    arguments = parse_arguments(make_parser(f"{SUBJECT}: GB/s of every cast beside a copy"), argv)
    if arguments.device.type != "cuda":
        print(f"{SUBJECT} measures GPU kernels and torch sees 0 CUDA devices in use: nothing was measured")
        return 0
    report = Report(arguments.device, json_path=arguments.json)
    for m, k in CASTS[:1] if arguments.quick else CASTS:
        generator = torch.Generator(arguments.device).manual_seed(0)
        x = torch.randn(m, k, generator=generator, device=arguments.device, dtype=torch.bfloat16)
        add_bandwidths(report, casts(x), f"M{m} K{k}", arguments)
    report.finish()
    if arguments.json is not None:
        write_beside(report.records, arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
