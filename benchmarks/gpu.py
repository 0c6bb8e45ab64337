"""Everything that a GPU is asked, in one run of at most eight minutes: `make bench-gpu`.

    python -m benchmarks.gpu [--out runs/bench] [--budget 480] [--only NAME ...]

First whether the products are right (`correctness`), then the fused ops, the products beside their peers, and whole
layers. Each part is a process of its own with a time limit, so that a kernel that hangs or faults ends its part and not
the run; what did not fit into the budget is named. The last table has one line a figure; every record lies in --out.
Exit code 1 when a part failed or the correctness part found a difference.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Part:
    """A benchmark module, its arguments, and how many seconds it may take."""

    name: str
    arguments: tuple[str, ...]
    seconds: float


CALLS = ("--device", "cuda", "--repeats", "15", "--warmup", "3")
FUSED = (
    *("swiglu", "norm", "rope", "route", "cross_entropy", "adamw", "grouped_mm", "quantize", "permute"),
    "decode_attention",
)
PARTS = (
    Part("correctness", ("--device", "cuda"), 100),
    Part("bench_layer", ("--device", "cuda", "--repeats", "7", "--warmup", "2"), 120),
    Part("bench_host", ("--device", "cuda"), 60),
    *(Part(f"bench_{name}", CALLS, 30) for name in FUSED),
    Part("bench_gemm", CALLS, 60),
    Part("bench_grouped_gemm", CALLS, 40),
    Part("bench_grouped_wgrad", CALLS, 40),
)
# Not here: those that need the trainer's packages, several processes, or no GPU.
APART = (
    *("bench_step", "bench_recompute", "bench_pipeline", "bench_dispatch", "bench_checkpoint", "bench_gradients"),
    *("bench_zero", "bench_generate", "bench_tokenize"),
)
SHOWN = ("throughput", "bandwidth", "time")  # a figure's metric in the last table, the first that a part records


@dataclass(frozen=True)
class Outcome:
    """What came of a part: None where it ended well, else why not, in words; its records."""

    part: Part
    failure: str | None
    seconds: float
    records: list[dict[str, Any]]


def run_part(part: Part, out: Path, limit: float) -> Outcome:
    """Run one part as a process for at most `limit` seconds; its output goes where ours goes."""
    file = out / f"{part.name}-cuda.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"benchmarks.{part.name}", *part.arguments, "--json", str(file)]
    started = time.monotonic()
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=limit, check=False).returncode
        failure = None if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        failure = f"did not end within {limit:.0f} s"
    records = json.loads(file.read_text()) if file.exists() else []
    return Outcome(part, failure, time.monotonic() - started, records)


def summary(outcomes: Sequence[Outcome], left_out: Sequence[Part]) -> str:
    """The last table: a part's name, time and outcome, then its figures, one line each."""
    lines = []
    for outcome in outcomes:
        lines.append(f"{outcome.part.name}: {outcome.failure or 'ok'}, {outcome.seconds:.0f} s")
        metrics = {record["metric"] for record in outcome.records}
        shown = next((metric for metric in SHOWN if metric in metrics), None)
        for record in outcome.records:
            if record["metric"] != shown:
                continue
            beside = "" if record["ratio"] is None else f"  {record['ratio']:.3f} of {record['baseline']}"
            figure = f"{record['value']:.4g} {record['unit']}"
            lines.append(f"  {record['name']:<28} {record['shape']:<26} {figure}{beside}")
    lines += [f"{part.name}: not run, the budget was spent" for part in left_out]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts, print the table; 1 where a part failed."""
    parser = argparse.ArgumentParser(description="Correctness and speed on one GPU, in one run")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the records (%(default)s)")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for all parts (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts alone")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    wanted = [part for part in PARTS if arguments.only is None or part.name in arguments.only]
    ends = time.monotonic() + arguments.budget
    outcomes: list[Outcome] = []
    left_out: list[Part] = []
    for part in wanted:
        left = ends - time.monotonic()
        if left < part.seconds / 2:
            left_out.append(part)
            continue
        print(f"== {part.name}", flush=True)
        outcomes.append(run_part(part, arguments.out.resolve(), min(part.seconds, left)))
    print(summary(outcomes, left_out))
    return int(any(outcome.failure for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
