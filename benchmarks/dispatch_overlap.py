"""Overlap of a dispatch and a combine with compute: the part `overlap` of bench_dispatch.

Hidden communication = (waited at once - overlapped) / time that waiting at once waits, pair by pair of alternated
trials, where "overlapped" runs compute as long as each message between its start and its wait. The permutation of rows
to experts is compute in both. Also reported: total times, waits, compute alone, and the longer of compute and waits.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from benchmarks.dispatch_layer import KINDS, Layer, ranks_of
from benchmarks.dispatch_traffic import Setting
from benchmarks.harness import Report
from fp8moe.profile.spans import exposed_seconds


def message_seconds(layer: Layer, kind: str, repeats: int = 5) -> list[float]:
    """Median seconds waited for each of the two messages of a forward."""
    layer.forward(kind)
    waits: list[list[float]] = []
    for _ in range(repeats):
        dist.barrier()
        first: list[float] = []
        exposed_seconds()
        layer.overlapped(kind, lambda i, seen=first: seen.append(exposed_seconds()))  # type: ignore[misc]
        waits.append([first[1], exposed_seconds()])
    return [statistics.median(wait[i] for wait in waits) for i in (0, 1)]


def busy(lengths: list[float]) -> Callable[[int], None]:
    """Matrix products on this CPU that last about `lengths[i]` seconds where every rank runs them at once.

    One product's time is the median over many blocks, about a second in all: the first calls are slow, and one
    interruption would spoil a short measurement. The quickest block was refused: where ranks share cores it is one that
    had a core to itself, so compute came out several times as long as the messages and hid them too easily.
    """
    a, b = torch.randn(2, 256, 256)
    blocks = []
    dist.barrier()
    for _ in range(64):
        start = time.perf_counter()
        for _ in range(32):
            torch.mm(a, b)
        blocks.append((time.perf_counter() - start) / 32)
    one = statistics.median(blocks[1:])

    def compute(i: int) -> None:
        for _ in range(max(1, round(lengths[i] / one))):
            torch.mm(a, b)

    return compute


def measure_overlap(report: Report, setting: Setting, trials: int) -> None:
    """Messages waited for at once against messages overlapped with compute as long as they are, in alternated trials.

    Two kinds of compute: products on this CPU, and a sleep of the same length, as a host does while its GPU computes.
    """
    layer = Layer(setting, ranks_of(setting))
    for kind in ["one hop"] if setting.per_node == 1 else list(KINDS):
        lengths = message_seconds(layer, kind)
        works = {"busy CPU": busy(lengths), "busy device": lambda i, lengths=lengths: time.sleep(lengths[i])}  # type: ignore[misc]
        for name, compute in works.items():
            seconds, exposed = overlap_trials(layer, kind, compute, trials)
            for how in exposed:
                report.add(f"{kind}, {name}: {how}", setting.shape, "time", statistics.median(seconds[how]) * 1e3, "ms")
                waits = statistics.median(exposed[how]) * 1e3
                report.add(f"{kind}, {name}: {how}, waits", setting.shape, "time", waits, "ms")
            hidden = statistics.median(
                (at_once - overlapped) / waited
                for at_once, overlapped, waited in zip(
                    seconds["waited at once"], seconds["overlapped"], exposed["waited at once"], strict=True
                )
            )
            report.add(f"{kind}, {name}: communication hidden", setting.shape, "share", hidden, "of 1")
            alone = statistics.median(seconds["compute alone"]) * 1e3
            report.add(f"{kind}, {name}: compute alone", setting.shape, "time", alone, "ms")
            longest = statistics.median(
                max(e, s - e) for s, e in zip(*(x["waited at once"] for x in (seconds, exposed)), strict=True)
            )
            report.add(f"{kind}, {name}: the longer part alone", setting.shape, "time", longest * 1e3, "ms")
    load = os.getloadavg()[0]
    report.add("load of the machine meanwhile", setting.shape, "processes", load, f"on {os.cpu_count()} cores")


def overlap_trials(
    layer: Layer, kind: str, compute: Callable[[int], None], trials: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Total seconds and seconds waited of each trial, at once and overlapped; also the seconds of compute alone."""
    seconds: dict[str, list[float]] = {"waited at once": [], "overlapped": [], "compute alone": []}
    exposed: dict[str, list[float]] = {"waited at once": [], "overlapped": []}

    def at_once() -> None:
        layer.forward(kind)
        start = time.perf_counter()
        compute(0)
        compute(1)
        seconds["compute alone"].append(time.perf_counter() - start)

    runs = {"waited at once": at_once, "overlapped": lambda: layer.overlapped(kind, compute)}
    for trial in range(trials):
        for name in list(runs) if trial % 2 == 0 else reversed(list(runs)):
            dist.barrier()
            exposed_seconds()
            start = time.perf_counter()
            runs[name]()
            exposed[name].append(exposed_seconds())
            seconds[name].append(time.perf_counter() - start)
    return seconds, exposed
