"""Grouped FP8 GEMMs: experts' rows, contiguous and aligned to 128, times their weights.

    python -m benchmarks.bench_grouped_gemm [--quick] [--shapes TEXT] [--consumers turns pingpong] [--json FILE]

Beside BF16 cuBLAS and plain Triton, and other libraries where importable: `peers`.
"""

from collections.abc import Sequence

from benchmarks import contest, peers
from benchmarks.shapes import GROUPED


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    return contest.main("Grouped FP8 GEMM", GROUPED, peers.grouped, argv)


if __name__ == "__main__":
    raise SystemExit(main())
