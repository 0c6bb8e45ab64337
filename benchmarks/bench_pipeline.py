"""Pipeline schedules: step time, bubble and hidden communication, measured from spans beside the simulator.

    python -m benchmarks.bench_pipeline                  four schedules at pp=2 x ep=2, four processes on this machine
    benchmarks/two_nodes.sh RATE 1 -m benchmarks.bench_pipeline --part overlap      DualPipeV at pp=1, ep=2, on and off
    benchmarks/two_nodes.sh RATE 2 -m benchmarks.bench_pipeline --part overlap      the same at pp=2, ep=2
    python -m benchmarks.bench_pipeline --device cuda    one GPU, a simulated all-to-all (pipeline_gpu.py)

Settings (`seq_len=256`) may follow the options. Choose RATE so that communication is 40 to 60 % of the step that waits
at once; `--part overlap` prints the share. On four processes the experts of a stage are spread over both nodes and a
pipeline lies within one: the layout in which the link carries what overlap can hide.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from benchmarks.harness import Report, make_parser, paired_ratio, parse_arguments
from benchmarks.local_ranks import run_on_ranks

if TYPE_CHECKING:
    from benchmarks.pipeline_trials import Trial
    from fp8moe.train.config import TrainConfig

SCHEDULES = ("1f1b", "zb1p", "dualpipe", "dualpipev")
COMPARED = ("experiment=quickstart", "seq_len=128", "batch.sequences=16", "batch.micro_batch=1", "parallel.pp=2",
            "parallel.ep=2")  # fmt: skip
# Every token meets experts of both ranks. Blocks are cut evenly by hand: an emulated FP8 block costs a CPU far more
# than its share of the arithmetic, and a pair of uneven stages leaves blocks alone, whose messages nothing hides.
HIDDEN = ("experiment=quickstart", "model.num_dense_layers=0", "model.mtp_depth=0", "model.router.topk=4",
          "model.router.num_groups=1", "model.router.top_groups=1", "model.experts.hidden=128", "seq_len=512",
          "batch.micro_batch=2", "parallel.schedule=dualpipev", "parallel.ep=2")  # fmt: skip
LAYOUTS = {1: "[2,2]", 2: "[1,1,1,1]"}  # by pipeline ranks
MICROBATCHES = 16
LEAST_TRIALS = 9


def median_ms(trials: Sequence[Trial], figure: Callable[[Trial], float]) -> float:
    """The median of `figure` over trials, in milliseconds."""
    return statistics.median(map(figure, trials)) * 1e3


def report_schedules(report: Report, done: dict[str, list[Trial]], shape: str) -> None:
    """The medians of each schedule beside 1F1B's, and the simulator's figures at the costs of the same steps."""
    seconds = {name: [trial.seconds for trial in trials] for name, trials in done.items()}
    for name, trials in done.items():
        first = name == SCHEDULES[0]
        ratio = None if first else paired_ratio(seconds[name], seconds[SCHEDULES[0]])
        report.add(name, shape, "step", statistics.median(seconds[name]) * 1e3, "ms",
                   baseline=None if first else SCHEDULES[0], ratio=ratio)  # fmt: skip
        passes, simulated = median_ms(trials, lambda t: t.passes), median_ms(trials, lambda t: t.simulated[0])
        report.add(f"{name}, simulated", shape, "forwards and backwards", simulated, "ms")
        report.add(f"{name}, measured", shape, "forwards and backwards", passes, "ms",
                   baseline=f"{name}, simulated", ratio=passes / simulated)  # fmt: skip
        report.add(f"{name}, simulated", shape, "bubble", median_ms(trials, lambda t: t.simulated[1]), "ms")
        report.add(f"{name}, measured", shape, "bubble", median_ms(trials, lambda t: t.mean("bubble")), "ms")
        report.add(name, shape, "communication hidden", statistics.median(t.hidden for t in trials), "of 1")


def report_overlap(report: Report, done: dict[str, list[Trial]], shape: str) -> None:
    """Overlapped steps against steps that wait at once, the share of communication in the latter, and the floor.

    The floor is the longer of compute and communication, which no overlap can go below. Processes that share cores
    don't reach it: one that waits leaves its core to another even without overlap, and computing takes longer once all
    compute at once.
    """
    off, on = done["waited at once"], done["overlapped"]
    share = statistics.median(t.mean("exposed") / t.seconds for t in off)
    floor = statistics.median(max(t.seconds - t.mean("exposed"), t.mean("exposed")) / t.seconds for t in off)
    ratio = paired_ratio([t.seconds for t in on], [t.seconds for t in off])
    report.add("waited at once", shape, "step", median_ms(off, lambda t: t.seconds), "ms")
    report.add("overlapped", shape, "step", median_ms(on, lambda t: t.seconds), "ms", baseline="waited at once",
               ratio=ratio)  # fmt: skip
    report.add("floor, max(compute, communication) / all", shape, "share of waited at once", floor, "of 1")
    report.add("waited at once", shape, "communication in the step", share, "of 1")
    for name, trials in done.items():
        report.add(name, shape, "computing", median_ms(trials, lambda t: t.mean("computing")), "ms")
        report.add(name, shape, "messages in flight", median_ms(trials, lambda t: t.mean("communication")), "ms")
        report.add(name, shape, "waits for them", median_ms(trials, lambda t: t.mean("exposed")), "ms")
        report.add(name, shape, "bubble", median_ms(trials, lambda t: t.mean("bubble")), "ms")
    report.add("overlapped", shape, "communication hidden", statistics.median(t.hidden for t in on), "of 1")
    less = statistics.median(1 - a.mean("exposed") / b.mean("exposed") for a, b in zip(on, off, strict=True))
    report.add("overlapped", shape, "waits less than waited at once", less, "of 1")


def shape_of(config: TrainConfig) -> str:
    """The shape for the record: mesh, width x blocks, tokens x micro-batches."""
    tokens, parallel, model = config.micro_batch * config.seq_len, config.parallel, config.model
    return f"pp{parallel.pp} ep{parallel.ep} {model.dim}x{model.num_layers} T{tokens}x{config.num_microbatches}"


def report_load(report: Report, shape: str) -> None:
    report.add("load of the machine meanwhile", shape, "processes", os.getloadavg()[0], f"on {os.cpu_count()} cores")


def measure_overlap(report: Report, arguments: argparse.Namespace) -> None:
    """DualPipeV overlapped and not; under torchrun, across two nodes."""
    from benchmarks import pipeline_trials

    across_nodes()
    dist.init_process_group("gloo", timeout=pipeline_trials.TIMEOUT)
    world = dist.get_world_size()
    pp = world // 2
    sizes = [f"parallel.pp={pp}", f"parallel.layout={LAYOUTS[pp]}", f"batch.sequences={4 * MICROBATCHES}"]
    words = [*HIDDEN, *sizes, *arguments.settings]
    run = pipeline_trials.built(pipeline_trials.configured(words, world))
    done = pipeline_trials.alternated(pipeline_trials.overlap_and_not(run), max(LEAST_TRIALS, arguments.repeats))
    shape = shape_of(run.config) + (f", {arguments.rate}" if arguments.rate else "")
    if run.is_first:
        report_overlap(report, done, shape)
        report_load(report, shape)
        report.finish()
    dist.barrier()
    dist.destroy_process_group()


def across_nodes() -> None:
    """Renumber the ranks across the nodes in turn: neighbouring ranks, which exchange tokens, are on two nodes."""
    nodes = int(os.environ["GROUP_WORLD_SIZE"])
    os.environ["RANK"] = str(int(os.environ["LOCAL_RANK"]) * nodes + int(os.environ["GROUP_RANK"]))


def measure_schedules(report: Report, arguments: argparse.Namespace) -> None:
    """All schedules, alternated, in four processes forked here."""
    from benchmarks import pipeline_trials

    names = ("1f1b", "dualpipev") if arguments.quick else SCHEDULES
    words = {name: [*COMPARED, f"parallel.schedule={name}", *arguments.settings] for name in names}
    config = pipeline_trials.configured(words[names[0]], 4)

    def trials() -> dict[str, list[Trial]]:
        configs = {name: pipeline_trials.configured(given, 4) for name, given in words.items()}
        runs = {name: (pipeline_trials.built(config), config) for name, config in configs.items()}
        return pipeline_trials.alternated(runs, arguments.repeats)

    done: dict[str, list[Trial]] = run_on_ranks(trials, 4, pipeline_trials.TIMEOUT)
    shape = shape_of(config)
    report_schedules(report, done, shape)
    report_load(report, shape)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the part asked for; under torchrun rank 0 reports."""
    description = "Pipeline schedules: time, bubble, hidden communication; simulated beside measured"
    parser = make_parser(description, settings=True, repeats=LEAST_TRIALS)
    parser.add_argument(
        "--part", choices=("schedules", "overlap", "gpu"), help="default: gpu with --device cuda, else schedules"
    )
    parser.add_argument("--rate", help="bandwidth of the link between the nodes, noted in the record")
    arguments = parse_arguments(parser, argv)
    report = Report(arguments.device, json_path=arguments.json)
    if arguments.part == "overlap":
        torch.set_num_threads(1)
        measure_overlap(report, arguments)
        return
    if arguments.part == "gpu" or (arguments.part is None and arguments.device.type == "cuda"):
        from benchmarks.pipeline_gpu import measure_gpu

        measure_gpu(report, arguments)
    else:
        measure_schedules(report, arguments)
    report.finish()


if __name__ == "__main__":
    main()
