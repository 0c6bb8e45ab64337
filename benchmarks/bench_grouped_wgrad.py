"""Grouped FP8 weight gradients: each expert contracts over its own tokens and adds into FP32.

    python -m benchmarks.bench_grouped_wgrad [--quick] [--shapes TEXT] [--consumers turns pingpong] [--json FILE]

Beside BF16 cuBLAS and plain Triton, and other libraries where importable: `peers`.
"""

from collections.abc import Sequence

from benchmarks import contest, peers
from benchmarks.shapes import GROUPED_WGRAD


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    return contest.main("Grouped FP8 weight gradient", GROUPED_WGRAD, peers.grouped_wgrad, argv)


if __name__ == "__main__":
    raise SystemExit(main())
