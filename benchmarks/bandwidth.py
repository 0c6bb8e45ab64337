"""Bytes a second of calls, beside a plain copy in the same run: what every benchmark of a memory-bound op measures."""

import argparse
import statistics
from collections.abc import Callable, Container, Mapping

from torch import Tensor

from benchmarks.harness import Report, alternate, summarize
from fp8moe.kernels.fp8 import E5m6Tensor, Fp8Tensor

COPY = "copy"
Entry = tuple[Callable[[], object], int]  # a call, and the bytes it must read and write; 0: only its time is told


def size_of(value: object) -> int:
    """Bytes of a tensor, scales included, or of the tensors of a tuple; nothing else has any."""
    if isinstance(value, Fp8Tensor | E5m6Tensor):
        return size_of((value.data, value.scale))
    if isinstance(value, tuple):
        return sum(map(size_of, value))
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def add_bandwidths(
    report: Report,
    entries: Mapping[str, Entry],
    shape: str,
    arguments: argparse.Namespace,
    back_end: str | None = None,
    others: Container[str] = (),
) -> None:
    """Run the calls in turn and add GB/s of each, its ratio the median over the copy's of the same trial.

    `entries` has one named COPY. A record's name begins with `back_end`, unless it is the copy or one of `others`.
    """
    calls = {name: call for name, (call, _) in entries.items()}
    seconds = alternate(calls, arguments.device, trials=arguments.repeats, warmup=arguments.warmup)
    copied = [entries[COPY][1] / t / 1e9 for t in seconds[COPY]]
    for name, times in seconds.items():
        size = entries[name][1]
        label = name if back_end is None or name == COPY or name in others else f"{back_end} {name}"
        if not size:
            report.add(label, shape, "time", summarize(times).median * 1e6, "us")
            continue
        speed = [size / t / 1e9 for t in times]
        ratio = statistics.median(a / b for a, b in zip(speed, copied, strict=True))
        beside = None if name == COPY else COPY
        report.add(
            label, shape, "bandwidth", statistics.median(speed), "GB/s",
            baseline=beside, ratio=ratio if beside else None,
        )  # fmt: skip
