"""What all benchmarks share: timing, A/B ratios inside one run, a table for people and records for machines.

Method. A figure is the median of many calls after a warm-up, because the times of a call have a tail on one side only.
On a GPU each call is timed by CUDA events, and before it a buffer of twice the L2 cache is overwritten: kernels in
training find their operands in HBM, not where the last repetition left them. The overwriting is repeated, so that the
device is still busy while the host enqueues the call, and the events enclose device time, not launch latency. On a CPU
the clock is perf_counter and no cache is flushed: a step there is far larger than the cache.

A ratio is taken inside one run only, from alternated trials (A B, B A, A B, ...), as the median of the ratios of the
pairs: a drifting clock, a neighbour on the machine, or a warming chip then strike both sides. Refused: a stored
baseline of another day, whose ratio would compare machines.

Units: seconds everywhere inside; a record says its own unit.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
L2_FLUSHES = 8
PACKAGES = ("torch", "triton", "numpy", "transformer-engine", "deep-gemm", "tokenizers", "datasets")


@dataclass(frozen=True)
class Record:
    """One figure. `baseline` names what it is compared with, in the same run; `ratio` is value / that one's value."""

    name: str  # what was measured: "quantize_rows", "step fp8"
    shape: str  # its size, in words a reader can repeat: "M4096 N7168 K2048"
    metric: str  # "time", "throughput", "bandwidth", "error"
    value: float
    unit: str  # "ms", "TFLOPS", "GB/s", "x"
    baseline: str | None
    ratio: float | None
    device: str
    versions: Mapping[str, str]
    commit: str
    command: str
    date: str


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated calls: the median, and the quartiles around it (how far to trust it)."""

    median: float
    lower: float
    upper: float
    calls: int


def summarize(seconds: Sequence[float]) -> Timing:
    """Median and quartiles of a non-empty sequence of times in seconds."""
    if not seconds:
        raise ValueError("summarize needs at least 1 time, got 0")
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0], 1)
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, lower, upper, len(seconds))


def time_calls(fn: Callable[[], object], device: torch.device, *, repeats: int, warmup: int = 0) -> list[float]:
    """Seconds of each of `repeats` calls of `fn` on `device`, after `warmup` calls that are not timed."""
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    for _ in range(warmup):
        fn()
    if device.type == "cuda":
        return _time_cuda(fn, device, repeats)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - start)
    return seconds


def _time_cuda(fn: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    properties = torch.cuda.get_device_properties(device)
    flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.int8, device=device)
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    with torch.cuda.device(device):
        for start, end in zip(starts, ends, strict=True):
            for _ in range(L2_FLUSHES):
                flush.zero_()
            start.record()
            fn()
            end.record()
        torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in zip(starts, ends, strict=True)]


def measure(fn: Callable[[], object], device: torch.device, *, repeats: int = 30, warmup: int = 5) -> Timing:
    """Median-of-many time of one call of `fn`; see the module's note for what is flushed and which clock runs."""
    return summarize(time_calls(fn, device, repeats=repeats, warmup=warmup))


def alternate(
    candidates: Mapping[str, Callable[[], object]], device: torch.device, *, trials: int = 9, warmup: int = 1
) -> dict[str, list[float]]:
    """Time every candidate once a trial, in turning order, for `trials` trials.

    Returns the seconds of each candidate, by name, trial by trial: what `paired_ratio` takes. A candidate is called
    `warmup` times first. The order turns round each trial, so that none always follows the same other.
    """
    if len(candidates) < 2:
        raise ValueError(f"alternated trials compare at least 2 candidates, got {len(candidates)}")
    for fn in candidates.values():
        for _ in range(warmup):
            fn()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for trial in range(trials):
        order = list(candidates)
        for name in order if trial % 2 == 0 else reversed(order):
            seconds[name] += time_calls(candidates[name], device, repeats=1)
    return seconds


def paired_ratio(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """Median over the trials of seconds / baseline of that trial: below 1 is faster than the baseline."""
    if len(seconds) != len(baseline) or not seconds:
        raise ValueError(f"a paired ratio needs as many trials on both sides, got {len(seconds)} and {len(baseline)}")
    return statistics.median(a / b for a, b in zip(seconds, baseline, strict=True))


def describe_device(device: torch.device) -> str:
    """The device in words: the GPU's name and SMs, or the CPU's name and the threads torch may use."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.multi_processor_count} SMs"
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} of {os.cpu_count()} threads"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_versions() -> dict[str, str]:
    """Versions of what decides a figure: Python, CUDA, and those of PACKAGES that are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions


def describe_commit(root: Path = ROOT) -> str:
    """Short commit of the tree at `root`, with `-dirty` when it differs from it; `unknown` outside a git checkout."""
    try:
        commit, status = (
            subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=30, check=True).stdout
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit.strip() + ("-dirty" if status.strip() else "")


class Report:
    """The records of one benchmark run: collected by `add`, shown and written by `finish`.

    Device, versions, commit, command and date are taken once, when the report is made, and stand in every record.
    """

    def __init__(self, device: torch.device, *, json_path: Path | None = None) -> None:
        self.json_path = json_path
        self.records: list[Record] = []
        self._blank = Record(
            name="",
            shape="",
            metric="",
            value=0.0,
            unit="",
            baseline=None,
            ratio=None,
            device=describe_device(device),
            versions=describe_versions(),
            commit=describe_commit(),
            command=shlex.join(["python", *sys.orig_argv[1:]]),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def add(
        self,
        name: str,
        shape: str,
        metric: str,
        value: float,
        unit: str,
        *,
        baseline: str | None = None,
        ratio: float | None = None,
    ) -> Record:
        """Add one figure; value and ratio must be finite, and a ratio must name its baseline (ValueError)."""
        if not math.isfinite(value) or (ratio is not None and not math.isfinite(ratio)):
            raise ValueError(f"{name} {shape}: value and ratio must be finite, got {value} and {ratio}")
        if (baseline is None) != (ratio is None):
            raise ValueError(f"{name} {shape}: baseline and ratio go together, got {baseline!r} and {ratio}")
        record = dataclasses.replace(
            self._blank, name=name, shape=shape, metric=metric, value=value, unit=unit, baseline=baseline, ratio=ratio
        )
        self.records.append(record)
        return record

    def table(self) -> str:
        """The records as aligned columns under the lines that say where and how they were measured."""
        header = ("name", "shape", "metric", "value", "unit", "ratio", "baseline")
        rows = [
            (r.name, r.shape, r.metric, f"{r.value:.4g}", r.unit, *_ratio_cells(r.ratio, r.baseline))
            for r in self.records
        ]
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
        run = self._blank
        lines = [f"device: {run.device}", "versions: " + ", ".join(f"{k} {v}" for k, v in run.versions.items())]
        lines += [f"commit: {run.commit}", f"command: {run.command}", f"date: {run.date}"]
        for row in [header, *rows]:
            cells = (
                cell.rjust(width) if column in (3, 5) else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    def finish(self) -> None:
        """Print the table; write the records to `json_path` (a list of objects) when one was given."""
        print(self.table())
        if self.json_path is None:
            return
        self.json_path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps([dataclasses.asdict(record) for record in self.records], indent=1, allow_nan=False)
        self.json_path.write_text(text + "\n")
        print(f"{len(self.records)} records in {self.json_path}")


def _ratio_cells(ratio: float | None, baseline: str | None) -> tuple[str, str]:
    return ("", "") if ratio is None or baseline is None else (f"{ratio:.3f}", baseline)


def make_parser(
    description: str, *, settings: bool = False, repeats: int = 30, warmup: int = 5
) -> argparse.ArgumentParser:
    """The arguments every benchmark takes; a benchmark adds its own before `parse_arguments`.

    settings: key=value arguments of a run may follow the options. repeats, warmup: this benchmark's defaults.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there, as a list of objects")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed calls, or trials of a ratio (%(default)s)")
    parser.add_argument("--warmup", type=int, default=warmup, help="calls before them, not timed (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats, for a look")
    if settings:
        parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the run, as of fp8moe train")
    return parser


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the shared arguments: `device` becomes a torch.device, `--quick` caps repeats at 9, warmup at 2.

    Ends with exit code 2 and one sentence when a GPU is asked for and none is there, or a count is out of range.
    """
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1 or arguments.warmup < 0:
        parser.error(f"--repeats must be >= 1 and --warmup >= 0, got {arguments.repeats} and {arguments.warmup}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device and torch sees 0: use --device cpu")
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.device = torch.device(arguments.device)
    if arguments.quick:
        arguments.repeats = min(arguments.repeats, 9)
        arguments.warmup = min(arguments.warmup, 2)
    return arguments
