"""Gradients summed beside the backward (ZeRO-1) and, as before it, by an all-reduce at the end of the step.

    benchmarks/two_nodes.sh 450mbit 1 -m benchmarks.bench_gradients --device cpu    two ranks joined by a slow link
    python -m benchmarks.bench_gradients --device cpu                               the same over loopback

Both ranks hold the whole model (pp = ep = 1), so all gradients cross the link. Per step: the seconds of the forwards
and backwards, the seconds that the step waits for gradients behind them, and the bytes counted at the call and, under
`two_nodes.sh`, at the interface, beside their formula. "alone" is the same reduce-scatter with nothing beside it.

At pp = 1 only the last micro-batch's backward can hide a gradient, and what its last pass finishes cannot be hidden:
the floor is that pass's share of the bytes.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.harness import Report, make_parser, paired_ratio, parse_arguments
from benchmarks.local_ranks import run_on_ranks
from benchmarks.pipeline_trials import TIMEOUT, built, configured
from fp8moe.parallel.collectives import gather, sent_bytes
from fp8moe.parallel.sharding.zero import Zero1
from fp8moe.profile.spans import Stopwatch
from fp8moe.train.run import Run
from fp8moe.train.step import forward_backward, next_batches, reduce, training_schedule

WORDS = ("experiment=quickstart", "precision=bf16", "parallel.ep=1", "batch.sequences=16", "batch.micro_batch=4",
         "steps=1000", "optimizer.sharding=zero1", "model.vocab_size=4096")  # fmt: skip
ALL_REDUCE, BESIDE, BEHIND = "all-reduce at the end", "reduce-scatter beside", "reduce-scatter at the end"


class AtTheEnd:
    """Starts every message behind the last pass, whose end nothing but `finish` tells."""

    def __init__(self, zero: Zero1) -> None:
        self._zero = zero
        self._passed: list[tuple[int, int]] = []
        self.begin, self.before_forward, self.wait_weights = zero.begin, zero.before_forward, zero.wait_weights

    def after_last_wgrad(self, stage: int, position: int) -> None:
        self._passed.append((stage, position))

    def finish(self) -> torch.Tensor:
        passed, self._passed = self._passed, []
        for place in passed:
            self._zero.after_last_wgrad(*place)
        return self._zero.finish()


@dataclass(frozen=True)
class Step:
    """Seconds of the slowest rank: forwards and backwards, one micro-batch's backward, then waiting for gradients.

    counted, interface: bytes that this rank handed over, and that its interface sent (0 over loopback).
    """

    passes: float
    backward: float
    waited: float
    counted: int
    interface: int

    @property
    def seconds(self) -> float:
        return self.passes + self.waited


def one_step(run: Run) -> Step:
    """Forward, backward and reduction of one global batch."""
    batches, counts = next_batches(run)
    run.model.main_grads.zero_()
    run.barrier()
    sent_bytes()
    stopwatch, before, start = Stopwatch(run.device), _interface(), time.perf_counter()
    forward_backward(run, batches, counts, 0.3, stopwatch)
    middle = time.perf_counter()
    reduce(run)
    end = time.perf_counter()
    run.barrier()
    times = (middle - start, stopwatch.read()["backward"] / len(batches), end - middle)
    passes, one_backward, waited = map(max, zip(*gather(times, run.mesh.world_group), strict=True))
    return Step(passes, one_backward, waited, counted=sum(sent_bytes().values()), interface=_interface() - before)


def _interface() -> int:
    name = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return 0 if name == "lo" else int(Path(f"/sys/class/net/{name}/statistics/tx_bytes").read_text())


def alone(run: Run, zero: Zero1) -> float:
    """Seconds of all reductions with nothing beside them."""
    run.barrier()
    start = time.perf_counter()
    zero.begin(training_schedule(run, run.config.num_microbatches))
    for place in sorted({place for one in zero.buckets for place in one.feeds}, reverse=True):
        zero.after_last_wgrad(*place)
    zero.finish()
    return max(gather(time.perf_counter() - start, run.mesh.world_group))


def floor(zero: Zero1, run: Run) -> float:
    """Share of the bytes that the last pass finishes."""
    zero.begin(training_schedule(run, run.config.num_microbatches))
    sizes = {one: one.bucket.spans[-1].stop - one.bucket.spans[0].start for one in zero.buckets}
    return sum(size for one, size in sizes.items() if (0, 0) in one.feeds) / sum(sizes.values())


def trials(words: Sequence[str], repeats: int) -> tuple[dict[str, list[Step]], list[float], float, int]:
    """Steps of each kind in alternating order, seconds of the reduction alone, the floor, and the formula's bytes."""
    run = built(configured(words, dist.get_world_size()))
    zero = run.zero
    assert zero is not None
    kinds: dict[str, Callable[[], object]] = {
        ALL_REDUCE: lambda: None,
        BESIDE: lambda: zero,
        BEHIND: lambda: AtTheEnd(zero),
    }
    steps: dict[str, list[Step]] = {kind: [] for kind in kinds}
    apart = []
    for trial in range(repeats + 1):
        for kind in list(kinds) if trial % 2 == 0 else reversed(list(kinds)):
            run.zero = kinds[kind]()  # type: ignore[assignment]
            step = one_step(run)
            if trial:
                steps[kind].append(step)
        apart.append(alone(run, zero))
    me = run.mesh.rank
    formula = sum(
        4 * (one.bucket.parts[-1][1] - one.bucket.parts[0][0] - (one.bucket.parts[me][1] - one.bucket.parts[me][0]))
        for one in zero.buckets
    )
    return steps, apart[1:], floor(zero, run), formula


def report_trials(report: Report, shape: str, steps: dict[str, list[Step]], apart: list[float], least: float) -> None:
    """What was hidden, what a step took, and what lay on the link."""
    seconds = {kind: [step.seconds for step in found] for kind, found in steps.items()}
    for kind, found in steps.items():
        ratio = None if kind == ALL_REDUCE else paired_ratio(seconds[kind], seconds[ALL_REDUCE])
        against = None if kind == ALL_REDUCE else ALL_REDUCE
        report.add(kind, shape, "step", statistics.median(seconds[kind]) * 1e3, "ms", baseline=against, ratio=ratio)
        waited = statistics.median(step.waited for step in found)
        report.add(f"{kind}: waits behind the backward", shape, "time", waited * 1e3, "ms")
    reduction = statistics.median(apart)
    backward = statistics.median(step.backward for step in steps[ALL_REDUCE])
    report.add("reduction alone", shape, "time", reduction * 1e3, "ms")
    report.add("reduction alone / a micro-batch's backward", shape, "ratio", reduction / backward, "x")
    exposed = [step.waited / alone for step, alone in zip(steps[BESIDE], apart, strict=True)]
    hidden = 1 - statistics.median(exposed)
    report.add("reduction hidden", shape, "share", hidden, "of 1")
    report.add("at most hidden: all but the last pass's bytes", shape, "share", 1 - least, "of 1")


def report_bytes(report: Report, shape: str, steps: dict[str, list[Step]], formula: int) -> None:
    """Bytes a rank sends in a step, by formula, at the call and at the interface."""
    report.add("bytes by formula, 4 n (W-1)/W", shape, "bytes", formula / 1e6, "MB")
    for kind in (BESIDE, ALL_REDUCE):
        counted = statistics.median(step.counted for step in steps[kind])
        if kind == BESIDE:
            assert counted == formula, (counted, formula)
            report.add(f"{kind}: bytes at the call", shape, "bytes", counted / 1e6, "MB")
        if link := statistics.median(step.interface for step in steps[kind]):
            report.add(f"{kind}: bytes at the interface", shape, "bytes", link / 1e6, "MB")


def main() -> None:
    """Measure; under torchrun rank 0 reports."""
    arguments = parse_arguments(make_parser("Gradients beside the backward"))
    if arguments.device.type == "cuda":
        print("bench_gradients measures processes on a CPU: nothing was measured; use --device cpu")
        return
    repeats = 2 if arguments.quick else max(5, min(arguments.repeats, 9))
    report = Report(arguments.device, json_path=arguments.json)
    if "RANK" not in os.environ:
        steps, apart, least, formula = run_on_ranks(lambda: trials(WORDS, repeats), 2, TIMEOUT)
    else:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=TIMEOUT)
        steps, apart, least, formula = trials(WORDS, repeats)
    if "RANK" not in os.environ or dist.get_rank() == 0:
        shape = f"quickstart, 2 ranks, {formula // 2 // 10**4 / 100:.2f}M parameters"
        report_trials(report, shape, steps, apart, least)
        report_bytes(report, shape, steps, formula)
        report.finish()
    if "RANK" in os.environ:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
