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
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.dispatch_traffic import Naive, Setting, Traffic, expected, forward_row, routing
from benchmarks.harness import Report, make_parser, parse_arguments
from fp8moe.kernels.quantize import quantize_rows
from fp8moe.layers.dispatch import Dispatcher
from fp8moe.parallel.collectives import all_reduce, exposed_seconds, sent_bytes
from fp8moe.parallel.dispatchers import make_dispatcher
from fp8moe.parallel.mesh import Mesh, build_mesh, warm_up

KINDS = {"one hop": "all_to_all", "two hops": "node_limited"}
TIMEOUT = timedelta(seconds=300)
CPU = torch.device("cpu")


class Layer:
    """One rank's batch and dispatchers, and the exchanges that are measured."""

    def __init__(self, setting: Setting, mesh: Mesh) -> None:
        self.setting, self.mesh = setting, mesh
        assert mesh.ep_group is not None
        self.all_ids = [routing(setting, seed) for seed in range(setting.ranks)]
        self.ids = self.all_ids[mesh.rank]
        generator = torch.Generator().manual_seed(mesh.rank)
        self.x = torch.randn(setting.tokens, setting.hidden, generator=generator).bfloat16()
        self.rows = quantize_rows(self.x, power_of_two=True)
        self.weights = torch.rand(setting.tokens, setting.topk, generator=generator)
        self.naive = Naive(mesh.ep_group, setting.experts)
        self.dispatchers: dict[str, Dispatcher] = {
            kind: make_dispatcher(name, mesh, setting.experts, max_tokens=setting.tokens, chunks=setting.chunks)
            for kind, name in KINDS.items()
        }

    def forward(self, kind: str) -> None:
        """Dispatch and combine, waited for at once."""
        if kind == "naive":
            got, way = self.naive.dispatch(self.x, self.ids)
            self.naive.combine(got, way)
            return
        self.overlapped(kind, lambda _: None)

    def overlapped(self, kind: str, compute: Callable[[int], None]) -> None:
        """Dispatch and combine, with `compute(0)` and `compute(1)` between their starts and waits."""
        dispatcher = self.dispatchers[kind]
        message = dispatcher.dispatch(self.rows, self.ids, self.weights)
        compute(0)
        arrived = message.wait()
        y_RD = arrived.weights_R.new_ones(1, dtype=torch.bfloat16).expand(len(arrived.weights_R), self.setting.hidden)
        home = dispatcher.combine(y_RD, arrived.layout)
        compute(1)
        home.wait()

    def verbs(self, kind: str) -> dict[str, float]:
        """Seconds of each verb, waited for at once."""
        d, seconds = self.dispatchers[kind], {}

        def timed(name: str, start: Callable[[], Any]) -> Any:
            dist.barrier()
            begin = time.perf_counter()
            value = start().wait()
            seconds[name] = time.perf_counter() - begin
            return value

        arrived = timed("dispatch", lambda: d.dispatch(self.rows, self.ids, self.weights))
        y_RD = torch.ones(len(arrived.weights_R), self.setting.hidden, dtype=torch.bfloat16)
        timed("combine", lambda: d.combine(y_RD, arrived.layout))
        timed("combine backward", lambda: d.combine_backward(self.rows, arrived.layout))
        timed("dispatch backward", lambda: d.dispatch_backward(y_RD, arrived.weights_R, arrived.layout))
        return seconds

    def counted(self) -> Traffic:
        """What all ranks handed to collectives since the last call, across nodes and inside them."""
        across = inside = 0
        for (group, peer), num_bytes in sent_bytes().items():
            if group.startswith("rail") or (
                group.startswith("ep") and peer // self.setting.per_node != self.mesh.rank // self.setting.per_node
            ):
                across += num_bytes
            else:
                inside += num_bytes
        return Traffic(*all_reduce(torch.tensor([across, inside]), self.mesh.dp_group).tolist())


def ranks_of(setting: Setting) -> Mesh:
    """The mesh of a process group that is up, warmed."""
    mesh = build_mesh(1, setting.ranks, setting.ranks, timeout=TIMEOUT, ranks_per_node=setting.per_node)
    warm_up(mesh, CPU)
    return mesh


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


def measure_overlap(report: Report, setting: Setting, trials: int) -> None:
    """Waited at once against overlapped with compute as long as the messages, in alternated trials."""
    mesh = ranks_of(setting)
    layer = Layer(setting, mesh)
    a, b = torch.randn(2, 256, 256)
    kinds = ["one hop"] if setting.per_node == 1 else list(KINDS)

    def lasting(seconds: float) -> int:
        start, n = time.perf_counter(), 200
        for _ in range(n):
            torch.mm(a, b)
        return max(1, round(n * seconds / (time.perf_counter() - start)))

    for kind in kinds:
        layer.forward(kind)
        waits: list[list[float]] = []
        for _ in range(5):  # how long each of the two messages is waited for
            dist.barrier()
            waited: list[float] = []
            exposed_seconds()
            layer.overlapped(kind, lambda i, seen=waited: seen.append(exposed_seconds()))  # type: ignore[misc]
            waits.append([waited[1], exposed_seconds()])
        lengths = [statistics.median(w[i] for w in waits) for i in (0, 1)]
        products = [lasting(length) for length in lengths]

        def compute(i: int, products: list[int] = products) -> None:
            for _ in range(products[i]):
                torch.mm(a, b)

        def both(kind: str = kind, compute: Callable[[int], None] = compute) -> None:
            layer.forward(kind)
            compute(0)
            compute(1)

        runs: dict[str, Callable[[], None]] = {
            "waited at once": both,
            "overlapped": lambda kind=kind, compute=compute: layer.overlapped(kind, compute),  # type: ignore[misc]
        }
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
        serial, overlapped = seconds["waited at once"], seconds["overlapped"]
        hidden = statistics.median(
            (s - o) / e for s, o, e in zip(serial, overlapped, exposed["waited at once"], strict=True)
        )
        for name in runs:
            report.add(f"{kind}: {name}", setting.shape, "time", statistics.median(seconds[name]) * 1e3, "ms")
            report.add(f"{kind}: {name}, waits", setting.shape, "time", statistics.median(exposed[name]) * 1e3, "ms")
        report.add(f"{kind}: communication hidden", setting.shape, "share", hidden, "of 1")


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
