"""Dispatch and combine: bytes a hop, time of the four verbs, what hides behind compute, against the naive all-to-all.

    python -m benchmarks.bench_dispatch                     bytes for many sizes by formula; four processes on loopback
    benchmarks/two_nodes.sh 200mbit 2 -m benchmarks.bench_dispatch --part bytes      across a link: counted at the call
                                                                                     and at the interface
    benchmarks/two_nodes.sh 200mbit 1 -m benchmarks.bench_dispatch --part overlap    what compute hides

Hidden communication = (waited at once - overlapped) / time that waiting at once waits, where "overlapped" runs compute
as long as each message between its start and its wait. The fan-out of rows to experts is compute in both.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.dispatch_layer import KINDS, TIMEOUT, Layer, ranks_of
from benchmarks.dispatch_traffic import Setting, expected, forward_row, routing
from benchmarks.harness import Report, make_parser, parse_arguments
from fp8moe.parallel.collectives import all_reduce, exposed_seconds
from fp8moe.parallel.mesh import Mesh


def interface_bytes(mesh: Mesh, per_node: int) -> int:
    """Bytes that all nodes have sent over the interface gloo uses; one rank a node reads it."""
    name = os.environ["GLOO_SOCKET_IFNAME"]
    mine = int(Path(f"/sys/class/net/{name}/statistics/tx_bytes").read_text()) if mesh.rank % per_node == 0 else 0
    return int(all_reduce(torch.tensor([mine]), mesh.dp_group))


def measure_bytes(report: Report, setting: Setting, repeats: int) -> None:
    """Cross-node bytes by formula, at the call and at the interface, and the time of a forward."""
    mesh = ranks_of(setting)
    layer = Layer(setting, mesh)
    crossed: dict[str, tuple[int, float]] = {}
    for kind in ("naive", *KINDS):
        layer.forward(kind)
        layer.counted()
        dist.barrier()
        before, start = interface_bytes(mesh, setting.per_node), time.perf_counter()
        for _ in range(repeats):
            layer.forward(kind)
        dist.barrier()
        seconds = (time.perf_counter() - start) / repeats
        link = (interface_bytes(mesh, setting.per_node) - before) / repeats
        got, told = layer.counted(), expected(kind, setting, layer.all_ids)
        assert (got.across, got.inside) == (told.across * repeats, told.inside * repeats), (kind, got, told)
        assert told.across <= link <= 1.10 * told.across, (kind, link / told.across)
        crossed[kind] = (told.across, link)
        against = None if kind == "naive" else "naive"
        figures = (("payload across, formula = counted", told.across), ("interface", link))
        for (what, num_bytes), naive in zip(figures, crossed["naive"], strict=True):
            ratio = num_bytes / naive if against else None
            report.add(
                f"{kind}: {what}", setting.shape, "bytes", num_bytes / 2**20, "MiB", baseline=against, ratio=ratio
            )
        report.add(f"{kind}: interface over payload", setting.shape, "bytes", link / told.across, "x")
        report.add(f"{kind}: dispatch + combine", setting.shape, "time", seconds * 1e3, "ms")
        report.add(f"{kind}: link", setting.shape, "bandwidth", link / setting.nodes / seconds / 1e9, "GB/s")
    if setting.hidden == 1024 and setting.topk == 8 and setting.experts == 64:
        assert crossed["two hops"][1] <= 0.22 * crossed["naive"][1]


def message_seconds(layer: Layer, kind: str, repeats: int = 5) -> list[float]:
    """How long each of the two messages of a forward is waited for, medians."""
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
    """Matrix products on this CPU that last about `lengths[i]` seconds when nothing else runs."""
    a, b = torch.randn(2, 256, 256)
    start, n = time.perf_counter(), 200
    for _ in range(n):
        torch.mm(a, b)
    one = (time.perf_counter() - start) / n

    def compute(i: int) -> None:
        for _ in range(max(1, round(lengths[i] / one))):
            torch.mm(a, b)

    return compute


def measure_overlap(report: Report, setting: Setting, trials: int) -> None:
    """Waited at once against overlapped with compute as long as the messages, in alternated trials.

    Twice: compute on this CPU, and a host that sleeps as long, as one does whose GPU computes.
    """
    layer = Layer(setting, ranks_of(setting))
    for kind in ["one hop"] if setting.per_node == 1 else list(KINDS):
        lengths = message_seconds(layer, kind)
        works = {"busy CPU": busy(lengths), "busy device": lambda i, lengths=lengths: time.sleep(lengths[i])}  # type: ignore[misc]
        for name, compute in works.items():
            seconds, exposed = overlap_trials(layer, kind, compute, trials)
            for how in seconds:
                report.add(f"{kind}, {name}: {how}", setting.shape, "time", statistics.median(seconds[how]) * 1e3, "ms")
                waits = statistics.median(exposed[how]) * 1e3
                report.add(f"{kind}, {name}: {how}, waits", setting.shape, "time", waits, "ms")
            hidden = statistics.median(
                (at_once - overlapped) / waited
                for at_once, overlapped, waited in zip(*seconds.values(), exposed["waited at once"], strict=True)
            )
            report.add(f"{kind}, {name}: communication hidden", setting.shape, "share", hidden, "of 1")
            longest = statistics.median(
                max(e, s - e) for s, e in zip(*(x["waited at once"] for x in (seconds, exposed)), strict=True)
            )
            report.add(f"{kind}, {name}: the longer part alone", setting.shape, "time", longest * 1e3, "ms")
    load = os.getloadavg()[0]
    report.add("load of the machine meanwhile", setting.shape, "processes", load, f"on {os.cpu_count()} cores")


def overlap_trials(
    layer: Layer, kind: str, compute: Callable[[int], None], trials: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds in all and seconds waited, of each trial, both ways."""

    def at_once() -> None:
        layer.forward(kind)
        compute(0)
        compute(1)

    runs = {"waited at once": at_once, "overlapped": lambda: layer.overlapped(kind, compute)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    exposed: dict[str, list[float]] = {name: [] for name in runs}
    for trial in range(trials):
        for name in list(runs) if trial % 2 == 0 else reversed(list(runs)):
            dist.barrier()
            exposed_seconds()
            start = time.perf_counter()
            runs[name]()
            exposed[name].append(exposed_seconds())
            seconds[name].append(time.perf_counter() - start)
    return seconds, exposed


def simulate(report: Report, quick: bool) -> None:
    """Bytes a rank sends across nodes for sizes too large for this machine, from drawn routings."""
    for ranks in (2, 8, 64) if quick else (2, 4, 8, 16, 32, 64):
        for hidden in (1024, 7168):
            per_node = min(8, ranks // 2)
            setting = Setting(128 if quick else 512, hidden, ranks, per_node, 256, 8, top_nodes=4)
            ids = [routing(setting, rank) for rank in range(ranks)]
            sent = {kind: expected(kind, setting, ids).across / ranks / 2**20 for kind in ("naive", *KINDS)}
            report.add("naive, a rank", setting.shape, "bytes across, simulated", sent["naive"], "MiB")
            for kind in KINDS:
                report.add(f"{kind}, a rank", setting.shape, "bytes across, simulated", sent[kind], "MiB",
                           baseline="naive, a rank", ratio=sent[kind] / sent["naive"])  # fmt: skip


def loopback(setting: Setting, repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of each verb and of the naive all-to-all, from processes forked here."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.SimpleQueue()
        ranks = [
            context.Process(target=_rank, args=(setting, repeats, rank, folder, queue)) for rank in range(setting.ranks)
        ]
        for process in ranks:
            process.start()
        answer = queue.get()
        for process in ranks:
            process.join()
    assert isinstance(answer, dict), answer
    return answer


def _rank(setting: Setting, repeats: int, rank: int, folder: str, queue: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(os.path.join(folder, "store"), setting.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=setting.ranks, timeout=TIMEOUT)
    layer = Layer(setting, ranks_of(setting))
    trials: dict[str, list[dict[str, float]]] = {"naive": [], "one hop": [], "two hops": []}
    for trial in range(repeats + 1):
        for kind in list(trials) if trial % 2 else reversed(list(trials)):
            if kind == "naive":
                dist.barrier()
                start = time.perf_counter()
                layer.forward(kind)
                trials[kind].append({"dispatch and combine": time.perf_counter() - start})
            else:
                trials[kind].append(layer.verbs(kind))
    if rank == 0:
        queue.put({kind: {verb: statistics.median(t[verb] for t in times[1:]) for verb in times[0]}
                   for kind, times in trials.items()})  # fmt: skip
    dist.barrier()
    os._exit(0)


def here(report: Report, arguments: argparse.Namespace) -> None:
    """What one machine can tell: simulated bytes, and times over loopback."""
    simulate(report, arguments.quick)
    sizes = [(128, 1024)] if arguments.quick else [(128, 1024), (1024, 1024), (4096, 1024), (512, 7168)]
    for tokens, hidden in sizes:
        setting = Setting(tokens, hidden, 4, 2, 64, 8)
        for kind, verbs in loopback(setting, min(arguments.repeats, 9)).items():
            for verb, seconds in verbs.items():
                report.add(f"{kind}: {verb}", setting.shape, "time", seconds * 1e3, "ms")


def main() -> None:
    """Choose the part; under torchrun rank 0 reports."""
    parser = make_parser("Dispatch and combine across ranks")
    parser.add_argument("--part", choices=("bytes", "overlap"), help="under torchrun: what to measure")
    parser.add_argument("--tokens", type=int, default=1024, help="a rank, under torchrun (default 1024)")
    parser.add_argument("--hidden", type=int, default=1024, help="under torchrun (default 1024)")
    parser.add_argument("--per-node", type=int, default=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    arguments = parse_arguments(parser)
    if arguments.device.type == "cuda" and "RANK" not in os.environ:
        print("Dispatch here is processes on a CPU, which a GPU's figures do not join: nothing was measured")
        return
    report = Report(arguments.device, json_path=arguments.json)
    if "RANK" not in os.environ:
        here(report, arguments)
        report.finish()
        return
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    setting = Setting(arguments.tokens, arguments.hidden, dist.get_world_size(), arguments.per_node, 64, 8)
    if arguments.part == "overlap":
        measure_overlap(report, setting, max(9, min(arguments.repeats, 15)))
    else:
        measure_bytes(report, setting, repeats=3)
    if dist.get_rank() == 0:
        print(f"an FP8 row is {forward_row(setting)} bytes out, {2 * setting.hidden} back")
        report.finish()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
