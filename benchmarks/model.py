"""PREDICTION of the Hopper GEMMs' speed from their tiles, beside what was measured and beside DeepGEMM's.

    python -m benchmarks.model [--sms 132]     of casts: benchmarks.model_casts

The model and its constants are `fp8moe/plan/gemm_model.py`, by which `fp8moe plan` times GEMMs without a record.

DeepGEMM is predicted from the tiles that its public heuristic chooses for these sizes (deep_gemm/jit_kernels/gemm.py
of its repository at the time of its pull request 86), so that the model is tested on a kernel that shares by multicast.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence

from benchmarks.shapes import DENSE, DENSE_WGRAD, GROUPED, GROUPED_WGRAD
from fp8moe.kernels.tiles import HOPPER_SMS, Tile
from fp8moe.plan.gemm_model import HBM_BYTES_PER_SECOND as HBM_BYTES_PER_SECOND
from fp8moe.plan.gemm_model import Work, predict, work_of
from fp8moe.plan.kernel_records import RECORDS, throughputs

FP8_PEAK = 1979e12
PROBLEMS = (*DENSE, *DENSE_WGRAD, *GROUPED, *GROUPED_WGRAD)
RESULTS = RECORDS


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


def measured(name: str = "gluon") -> dict[str, float]:
    """ "op label" -> TFLOPS of candidate `name` in the committed records of an H100."""
    return dict(throughputs("H100", name))


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
    title = (
        f"PREDICTION, TFLOPS on {sms} SMs without pairs of CTAs and with; in brackets: that of a measured figure.\n"
        "measured, cuBLASLt: an H100 (benchmarks/results). DeepGEMM: an H800, its README of April 2025 and its pull "
        "requests 74 and 86."
    )
    return "\n".join([title, *_lines(rows(sms))])


def _lines(found: Iterable[dict[str, str]]) -> list[str]:
    """A heading and the rows, in columns."""
    found = list(found)
    cells = [list(found[0]), *(list(row.values()) for row in found)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]


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
