"""Dense FP8 GEMMs: DeepSeek-V3's Linears forward and backward (1x128 by 128x128, BF16 out), and a weight gradient.

    python -m benchmarks.bench_gemm [--quick] [--shapes TEXT] [--consumers turns pingpong] [--json FILE]

Beside BF16 cuBLAS, cuBLASLt's block-scaled FP8 and plain Triton, and other libraries where importable: `peers`.
"""

from collections.abc import Sequence

from benchmarks import contest, peers
from benchmarks.shapes import DENSE, DENSE_WGRAD


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    return contest.main("FP8 GEMM", (*DENSE, *DENSE_WGRAD), peers.dense, argv)


if __name__ == "__main__":
    raise SystemExit(main())
