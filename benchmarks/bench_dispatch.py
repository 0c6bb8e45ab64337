"""Dispatch and combine beside the naive all-to-all: bytes a hop, time of the four verbs, messages hidden by compute.

    python -m benchmarks.bench_dispatch                     bytes for many sizes by formula; four processes on loopback
    benchmarks/two_nodes.sh 200mbit 2 -m benchmarks.bench_dispatch --part bytes      across a link: counted at the call
                                                                                     and at the interface
    benchmarks/two_nodes.sh 200mbit 1 -m benchmarks.bench_dispatch --part overlap    messages hidden by compute
                                                                                     (dispatch_overlap.py)

GB/s of a hop: payload that one rank sends over it in a verb, by the verb's time, which includes casts, plans and sums.
With `--json FILE` a plot (SVG) lies beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.dispatch_layer import KINDS, TIMEOUT, VERBS, Layer, VerbCost, ranks_of
from benchmarks.dispatch_overlap import measure_overlap
from benchmarks.dispatch_plot import SIMULATED, plot_beside
from benchmarks.dispatch_traffic import Setting, expected, forward_row, routing
from benchmarks.harness import Report, make_parser, paired_ratio, parse_arguments
from benchmarks.local_ranks import run_on_ranks
from fp8moe.parallel.collectives import all_reduce
from fp8moe.parallel.mesh import Mesh


def interface_bytes(mesh: Mesh, per_node: int) -> int:
    """Bytes that all nodes have sent over the interface gloo uses; one rank a node reads it."""
    name = os.environ["GLOO_SOCKET_IFNAME"]
    mine = int(Path(f"/sys/class/net/{name}/statistics/tx_bytes").read_text()) if mesh.rank % per_node == 0 else 0
    return int(all_reduce(torch.tensor([mine]), mesh.dp_group))


def measure_bytes(report: Report, setting: Setting, repeats: int) -> None:
    """Bytes across nodes by formula, at the call and at the interface; time of a forward and of each verb."""
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
        got, want = layer.counted(), expected(kind, setting, layer.all_ids)
        assert (got.across, got.inside) == (want.across * repeats, want.inside * repeats), (kind, got, want)
        assert want.across <= link <= 1.10 * want.across, (kind, link / want.across)
        crossed[kind] = (want.across, link)
        against = None if kind == "naive" else "naive"
        figures = (("payload across, formula = counted", want.across), ("interface", link))
        for (what, num_bytes), naive in zip(figures, crossed["naive"], strict=True):
            ratio = num_bytes / naive if against else None
            report.add(
                f"{kind}: {what}", setting.shape, "bytes", num_bytes / 2**20, "MiB", baseline=against, ratio=ratio
            )
        report.add(f"{kind}: interface over payload", setting.shape, "bytes", link / want.across, "x")
        report.add(f"{kind}: dispatch + combine", setting.shape, "time", seconds * 1e3, "ms")
        report.add(f"{kind}: link", setting.shape, "bandwidth", link / setting.nodes / seconds / 1e9, "GB/s")
    report_verbs(report, setting, verb_trials(layer, repeats))
    if setting.hidden == 1024 and setting.topk == 8 and setting.experts == 64:
        assert crossed["two hops"][1] <= 0.22 * crossed["naive"][1]


def simulate(report: Report, quick: bool) -> None:
    """Bytes a rank sends across nodes at sizes too large for this machine, by formula from random routings."""
    sizes = [(128, 1024)] if quick else [(tokens, hidden) for hidden in (1024, 4096, 7168) for tokens in (128, 16384)]
    for ranks in (2, 8, 64) if quick else (2, 4, 8, 16, 32, 64):
        for tokens, hidden in sizes:
            setting = Setting(tokens, hidden, ranks, min(8, ranks // 2), 256, 8, top_nodes=4)
            ids = [routing(setting, rank) for rank in range(min(ranks, 8))]
            sent = {kind: expected(kind, setting, ids).across / len(ids) / 2**20 for kind in ("naive", *KINDS)}
            report.add("naive, a rank", setting.shape, SIMULATED, sent["naive"], "MiB")
            for kind in KINDS:
                report.add(f"{kind}, a rank", setting.shape, SIMULATED, sent[kind], "MiB",
                           baseline="naive, a rank", ratio=sent[kind] / sent["naive"])  # fmt: skip


Trials = dict[str, list[dict[str, VerbCost]]]  # by kind: the verbs of each trial


def verb_trials(layer: Layer, repeats: int) -> Trials:
    """All verbs of all kinds, `repeats` times in alternating order, after one run that is not kept."""
    trials: Trials = {kind: [] for kind in ("naive", *KINDS)}
    for trial in range(repeats + 1):
        for kind in list(trials) if trial % 2 else reversed(list(trials)):
            trials[kind].append(layer.verbs(kind))
    return {kind: costs[1:] for kind, costs in trials.items()}


def report_verbs(report: Report, setting: Setting, trials: Trials) -> None:
    """Time of each verb beside the naive one's, and its bandwidth over each hop, for the bytes of rank 0."""
    for kind, costs in trials.items():
        for verb in VERBS:
            seconds, naive = ([cost[verb].seconds for cost in trials[k]] for k in (kind, "naive"))
            against = None if kind == "naive" else f"naive: {verb}"
            ratio = paired_ratio(seconds, naive) if against else None
            median = statistics.median(seconds)
            report.add(f"{kind}: {verb}", setting.shape, "time", median * 1e3, "ms", baseline=against, ratio=ratio)
            sent = costs[0][verb].sent
            for hop, num_bytes in (("across nodes", sent.across), ("inside the node", sent.inside)):
                if num_bytes:
                    report.add(f"{kind}: {verb}, {hop}", setting.shape, "bandwidth", num_bytes / median / 1e9, "GB/s")


def loopback(setting: Setting, repeats: int) -> Trials:
    """The verbs of all kinds, the naive all-to-all's too, on processes forked here."""
    trials: Trials = run_on_ranks(
        lambda: verb_trials(Layer(setting, ranks_of(setting)), repeats), setting.ranks, TIMEOUT
    )
    return trials


def loopback_settings(quick: bool) -> list[Setting]:
    """Tokens a rank and hidden on 2 nodes of 2 ranks; then the other sizes of a world."""
    if quick:
        return [Setting(128, 1024, 4, 2, 64, 8)]
    sizes = [(t, 1024) for t in (128, 512, 2048, 4096, 16384)] + [(t, h) for h in (4096, 7168) for t in (128, 2048)]
    worlds = [Setting(512, 1024, 2, 1, 64, 8), Setting(512, 1024, 8, 4, 64, 8)]
    return [Setting(t, h, 4, 2, 64, 8) for t, h in sizes] + worlds


def here(report: Report, arguments: argparse.Namespace) -> None:
    """Without torchrun: simulated bytes, and times over loopback."""
    simulate(report, arguments.quick)
    for setting in loopback_settings(arguments.quick):
        long = setting.tokens * setting.hidden > 2**22
        report_verbs(report, setting, loopback(setting, min(arguments.repeats, 3 if long else 9)))


def main() -> None:
    """Run the part asked for; under torchrun rank 0 reports."""
    parser = make_parser("Dispatch and combine across ranks")
    parser.add_argument("--part", choices=("bytes", "overlap"), help="under torchrun: bytes and times, or overlap")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a rank, under torchrun (default 1024)")
    parser.add_argument("--hidden", type=int, default=1024, help="features of a row, under torchrun (default 1024)")
    parser.add_argument("--per-node", type=int, default=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
                        help="ranks of a node, under torchrun (default: LOCAL_WORLD_SIZE)")  # fmt: skip
    arguments = parse_arguments(parser)
    if arguments.device.type == "cuda" and "RANK" not in os.environ:
        print("bench_dispatch measures processes on a CPU: nothing was measured; use --device cpu")
        return
    report = Report(arguments.device, json_path=arguments.json)
    if "RANK" not in os.environ:
        here(report, arguments)
        report.finish()
        plot_beside(report)
        return
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    setting = Setting(arguments.tokens, arguments.hidden, dist.get_world_size(), arguments.per_node, 64, 8)
    if arguments.part == "overlap":
        measure_overlap(report, setting, max(9, min(arguments.repeats, 15)))
    else:
        measure_bytes(report, setting, repeats=3)
    if dist.get_rank() == 0:
        print(f"an FP8 row is {forward_row(setting)} bytes in a dispatch, {2 * setting.hidden} in a combine")
        report.finish()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
