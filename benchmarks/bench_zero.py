"""Optimizer shardings: reducing gradients and updating weights, beside DeepSpeed's ZeRO-1 in the same processes.

    python -m benchmarks.bench_zero [--quick] [--json FILE] [key=value ...]

Two processes on this machine, joined by gloo over loopback, hold one run per sharding, of the same model; trials
alternate. `reduce` sums the gradients over the replicas and gives their norm, `update` is all else until the weights
are whole again; times are those of the slower rank. Gradients are random numbers, set before every trial and not
counted. All keep FP32 moments, because DeepSpeed does. On one machine a message costs a copy, so that work counts here
and not bytes: over a link, compare the bytes first. DeepSpeed's is measured where the package is installed.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benchmarks.harness import Report, make_parser, paired_ratio, parse_arguments
from benchmarks.local_ranks import run_on_ranks

if TYPE_CHECKING:
    from fp8moe.train.run import Run

DEEPSPEED = "deepspeed"
SHARDINGS = ("none", "zero1", DEEPSPEED)
WORLD_SIZE = 2
SETTINGS = ("experiment=quickstart", "precision=bf16", "model.dim=512", "model.experts.hidden=256",
            "model.num_layers=4", "parallel.ep=1", "optimizer.moments=fp32", "checkpoint.background=false")  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """Seconds of one step's reduction and update."""

    reduce: float
    update: float

    @property
    def both(self) -> float:
        return self.reduce + self.update


def shardings() -> tuple[str, ...]:
    """Those that can be measured here; who is left out is said."""
    if importlib.util.find_spec(DEEPSPEED) is not None:
        return SHARDINGS
    print('deepspeed is not installed and left out: pip install "fp8moe[deepspeed]"')
    return tuple(name for name in SHARDINGS if name != DEEPSPEED)


def one_trial(run: Run, gradients: tuple[torch.Tensor, torch.Tensor]) -> Trial:
    """Reduce and update once from `gradients`, dense and experts'. Collective."""
    from fp8moe.parallel.collectives import gather
    from fp8moe.train.step import reduce, training_schedule

    main_grads = run.model.main_grads
    main_grads.dense.copy_(gradients[0])
    main_grads.expert.copy_(gradients[1])
    run.barrier()
    start = time.perf_counter()
    if run.zero is not None:  # what starts its messages in a step is the end of a backward's passes
        run.zero.begin(training_schedule(run, run.config.num_microbatches))
        for place in sorted({place for one in run.zero.buckets for place in one.feeds}, reverse=True):
            run.zero.after_last_wgrad(*place)
    grad_norm = reduce(run)
    middle = time.perf_counter()
    run.optimizer.step(1e-4, grad_norm)
    if run.zero is not None:
        run.zero.wait_weights()
    seconds = gather((middle - start, time.perf_counter() - middle), run.mesh.world_group)
    return Trial(max(reducing for reducing, _ in seconds), max(updating for _, updating in seconds))


def alternated(runs: dict[str, Run], trials: int, warmup: int) -> dict[str, list[Trial]]:
    """`trials` trials of each run in alternating order, after some that are not counted. Collective."""
    main_grads = next(iter(runs.values())).model.main_grads
    gradients = (torch.randn_like(main_grads.dense), torch.randn_like(main_grads.expert))
    done: dict[str, list[Trial]] = {name: [] for name in runs}
    for number in range(warmup + trials):
        for name in list(runs) if number % 2 == 0 else reversed(list(runs)):
            one = one_trial(runs[name], gradients)
            if number >= warmup:
                done[name].append(one)
    return done


def report_trials(report: Report, done: dict[str, list[Trial]], shape: str) -> None:
    """The medians of each sharding, and their ratios to DeepSpeed's where it ran."""
    for name, trials in done.items():
        for part in ("reduce", "update", "both"):
            seconds = [getattr(trial, part) for trial in trials]
            theirs = [getattr(trial, part) for trial in done.get(DEEPSPEED, [])]
            ratio = paired_ratio(seconds, theirs) if theirs and name != DEEPSPEED else None
            report.add(name, shape, part, statistics.median(seconds) * 1e3, "ms",
                       baseline=None if ratio is None else DEEPSPEED, ratio=ratio)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    from benchmarks import pipeline_trials

    parser = make_parser(
        "Reducing gradients and updating weights, beside DeepSpeed's ZeRO-1", settings=True, repeats=15
    )
    arguments = parse_arguments(parser, argv)
    report = Report(arguments.device, json_path=arguments.json)
    if arguments.device.type == "cuda":
        print("two processes with a GPU each are needed, and this benchmark starts two on CPUs: use --device cpu")
        return
    names = shardings()

    def measured() -> tuple[str, dict[str, list[Trial]]]:
        words = [*SETTINGS, *arguments.settings]
        runs = {
            name: pipeline_trials.built(pipeline_trials.configured([*words, f"optimizer.sharding={name}"], WORLD_SIZE))
            for name in names
        }
        run = runs[names[0]]
        elements = run.model.main_grads.dense.numel() + run.model.main_grads.expert.numel()
        shape = f"dp{run.mesh.dp} ep{run.mesh.ep}, {elements / 1e6:.1f} M parameters a rank"
        return shape, alternated(runs, arguments.repeats, arguments.warmup)

    shape, done = run_on_ranks(measured, WORLD_SIZE, pipeline_trials.TIMEOUT)
    report_trials(report, done, shape)
    report.finish()


if __name__ == "__main__":
    main()
