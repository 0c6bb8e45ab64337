"""Runs the contests of `peers` over a list of problems and turns them into records, a Markdown table and a plot.

Throughput is FLOPs over the median time, ratios are medians over alternated trials of one run (`harness`), the error is
that of 256 rows of the output against FP64 of the dequantized operands (for the BF16 peer and those that cast
themselves it includes what the cast cost). With --json FILE the table and the plot are written beside it.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from benchmarks.harness import Record, Report, alternate, make_parser, measure, paired_ratio, parse_arguments, summarize
from benchmarks.model import FP8_PEAK
from benchmarks.peers import BF16, ORDERED, Contest, Operands
from benchmarks.plot import bars
from benchmarks.shapes import Problem
from fp8moe.kernels.fp8 import TILE, Fp8Tensor
from tests.distance import calc_diff

SAMPLED_ROWS = 128  # at the start of the first group and at the end of the last
OWN = "gluon"


def main(
    subject: str,
    problems: Sequence[Problem],
    enter: Callable[..., Contest],
    argv: Sequence[str] | None,
) -> int:
    """The whole of a GEMM benchmark: 0, also where there is no GPU and so nothing to measure (it says so)."""
    parser = make_parser(f"{subject}: TFLOPS of every back end and peer on a Hopper GPU")
    parser.add_argument("--shapes", metavar="TEXT", help="only sizes whose label holds TEXT, such as K2048")
    parser.add_argument(
        "--consumers", choices=tuple(ORDERED), nargs="+", default=(), help="of the Gluon kernels, beside the table's"
    )
    arguments = parse_arguments(parser, argv)
    if arguments.device.type != "cuda":
        print(f"{subject} measures GPU kernels and torch sees 0 CUDA devices in use: nothing was measured")
        return 0
    chosen = [p for p in problems if arguments.shapes is None or arguments.shapes in p.label]
    if not chosen:
        parser.error(
            f"--shapes {arguments.shapes!r} fits 0 of {len(problems)} sizes: use a part of {problems[0].label!r}"
        )
    if arguments.quick:
        chosen = chosen[:: max(1, len(chosen) // 2)]
    report = Report(arguments.device, json_path=arguments.json)
    if arguments.consumers:
        enter = partial(enter, orders=arguments.consumers)
    for problem in chosen:
        contest_one(problem, enter, report, arguments)
    report.finish()
    if arguments.json is not None:
        write_beside(report.records, arguments.json)
    return 0


def contest_one(
    p: Problem, enter: Callable[[Problem, Operands], Contest], report: Report, arguments: argparse.Namespace
) -> None:
    """Measure one problem and add its records: throughput, share of peak, error, and the own kernel's ratios."""
    x = Operands.make(p, arguments.device)
    contest = enter(p, x)
    for name, reason in contest.left_out.items():
        print(f"{p.op} {p.label}: {name} is left out: {reason}")
    calls = contest.candidates
    if len(calls) > 1:
        seconds = alternate(calls, arguments.device, trials=arguments.repeats, warmup=arguments.warmup)
    else:
        seconds = {n: [measure(c, arguments.device, repeats=arguments.repeats).median] for n, c in calls.items()}
    for name, times in seconds.items():
        tflops = p.flops / summarize(times).median / 1e12
        beside = BF16 if BF16 in seconds and name != BF16 else None
        ratio = 1 / paired_ratio(times, seconds[BF16]) if beside else None
        report.add(f"{p.op} {name}", p.label, "throughput", tflops, "TFLOPS", baseline=beside, ratio=ratio)
        report.add(f"{p.op} {name}", p.label, "share of FP8 peak", tflops * 1e12 / FP8_PEAK * 100, "%")
        report.add(f"{p.op} {name}", p.label, "error", error_of(p, x, contest, calls[name]), "calc_diff")
    for name in seconds:
        if OWN in seconds and name not in (OWN, BF16):
            ratio = 1 / paired_ratio(seconds[OWN], seconds[name])
            report.add(f"{p.op} {OWN}", p.label, "speed", ratio, "x", baseline=name, ratio=ratio)


def error_of(p: Problem, x: Operands, contest: Contest, call: Callable[[], Tensor]) -> float:
    """The larger error of the sampled rows of the first and of the last group."""
    if contest.total is not None:
        contest.total.zero_()
    out = call()
    found = []
    for group, start in ((0, 0), (p.groups - 1, p.m - SAMPLED_ROWS)):
        a, b = part(p, x, group, slice(start, start + SAMPLED_ROWS))
        rows = out.view(p.groups, p.m, p.n)[group, start : start + SAMPLED_ROWS]
        found.append(calc_diff(rows, a.double() @ b.double().t(), a, b))
    return max(found)


def part(p: Problem, x: Operands, group: int, rows: slice) -> tuple[Tensor, Tensor]:
    """Dequantized operands of some rows of a group's output: [rows, K], [N, K]."""
    if p.kind == "rows":
        rows = slice(group * p.m + rows.start, group * p.m + rows.stop)
        left = Fp8Tensor(x.a.data[rows], x.a.scale[rows])
        own = (x.b.data[group], x.b.scale[group]) if p.groups > 1 else (x.b.data, x.b.scale)
        return left.dequantize(), Fp8Tensor(*own, x.b.tile).dequantize()
    tokens = slice(group * p.k, (group + 1) * p.k)
    tiles = slice(tokens.start // TILE, -(-tokens.stop // TILE))
    left, right = (
        Fp8Tensor(q.data[keep, tokens], q.scale[keep, tiles]) for q, keep in ((x.a, rows), (x.b, slice(None)))
    )
    return left.dequantize(), right.dequantize()


def markdown(records: Sequence[Record]) -> str:
    """One row a size, one column a candidate: value, and in brackets the ratio to the baseline."""
    shown = [r for r in records if r.metric in ("throughput", "bandwidth")]
    names = list(dict.fromkeys(r.name for r in shown))
    cells = {(r.shape, r.name): f"{r.value:.0f}" + (f" ({r.ratio:.2f}x)" if r.ratio else "") for r in shown}
    lines = [f"{shown[0].device}; {shown[0].commit}; {shown[0].date}; `{shown[0].command}`", ""] if shown else []
    lines += ["| size | " + " | ".join(f"{n} {_unit(shown, n)}" for n in names) + " |", "|---" * (len(names) + 1) + "|"]
    for shape in dict.fromkeys(r.shape for r in shown):
        lines.append(f"| {shape} | " + " | ".join(cells.get((shape, name), "-") for name in names) + " |")
    return "\n".join(lines) + "\n"


def _unit(records: Sequence[Record], name: str) -> str:
    return next(r.unit for r in records if r.name == name)


def write_beside(records: Sequence[Record], path: Path) -> None:
    """The Markdown table and the plot, beside the JSON file `path`."""
    path.with_suffix(".md").write_text(markdown(records))
    path.with_suffix(".svg").write_text(bars(records))
    print(f"table in {path.with_suffix('.md')}, plot in {path.with_suffix('.svg')}")
