"""A training step in FP8, BF16 and FP32, and its forward and backward alone beside `transformers`.

One process with all experts, the model and batch of the quickstart; settings (`model.dim=512`) may follow the options.
All candidates of a table are alternated step by step and start from the same weights on the same data.

    step P                  the whole step: forward, backward, clip, update, quantization of the weights, MTP included
    forward+backward P      zeroed gradients, forward and backward of the same batch again and again, without MTP
    ... transformers P      the same by transformers' DeepSeek-V3 of equal weights, where it is installed (extra `hf`)

FP8 and FP32 stand beside our BF16, our BF16 beside the faster of transformers' two attentions. "time" is the median,
its ratio the median over pairs of trials; "fastest" is the shortest trial and the ratio of those: it stands when other
processes disturb. On a CPU FP8 is emulated bit by bit; its products need FP32 sums, which cost twice a BF16 product
without AMX.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.harness import Report, alternate, make_parser, paired_ratio, parse_arguments, summarize
from benchmarks.transformers_step import ATTENTION, transformers_step

if TYPE_CHECKING:
    from fp8moe.data.packing import Batch
    from fp8moe.model.loss import LossCounts
    from fp8moe.train.run import Run

PRECISIONS = ("bf16", "fp8", "fp32")
BASELINE = "bf16"
SAME_LOSS = 0.01  # relative: the losses of candidates that compute the same model


def runs(settings: Sequence[str], device: str, folder: Path) -> dict[str, Run]:
    """A run of each precision, ready for its first step. Raises ModuleNotFoundError without the trainer's packages."""
    from fp8moe.cli.compose import compose
    from fp8moe.parallel.mesh import Mesh
    from fp8moe.train.build import build
    from fp8moe.train.config import resolve
    from fp8moe.train.processes import choose_device

    made = {}
    for precision in PRECISIONS:
        words = ["experiment=quickstart", *settings, f"precision={precision}", f"device={device}"]
        config = resolve(compose(words).config, 1)
        made[precision] = build(config, Mesh(1, 1, 1, rank=0), choose_device(config), folder)
    return made


def forward_backward(run: Run, batches: list[Batch], counts: LossCounts) -> float:
    """Zero the gradients, go forward and backward of a step -> its loss, nats a predicted token."""
    from fp8moe.profile.spans import Stopwatch
    from fp8moe.train import step

    run.model.main_grads.zero_()
    return step.forward_backward(run, batches, counts, 0.0, Stopwatch(run.device)).main


def alone(ready: Mapping[str, Run]) -> dict[str, Callable[[], float]]:
    """Forward and backward of each run without MTP on one batch, and transformers' where it is installed."""
    from fp8moe.train.step import next_batches

    batches, counts = next_batches(ready[BASELINE])
    calls: dict[str, Callable[[], float]] = {
        precision: partial(forward_backward, run, batches, counts) for precision, run in ready.items()
    }
    if len(batches) > 1:
        print(f"a step of {len(batches)} micro-batches has no counterpart in transformers: use batch.micro_batch=null")
        return calls
    for dtype in (torch.bfloat16, torch.float32):
        precision = "bf16" if dtype is torch.bfloat16 else "fp32"
        for attention in ATTENTION:
            try:
                call = transformers_step(ready[precision], batches[0], dtype, attention)
            except ModuleNotFoundError as missing:
                print(f"{missing.name} is not installed (extra `hf`): nothing is measured beside it")
                return calls
            calls[f"transformers {precision} {attention}"] = call
    return calls


def check_losses(calls: Mapping[str, Callable[[], float]]) -> None:
    """Raise ValueError unless all candidates have the same loss: else they don't compute the same."""
    losses = {name: call() for name, call in calls.items()}
    for name, loss in losses.items():
        if not abs(loss - losses[BASELINE]) <= SAME_LOSS * losses[BASELINE]:
            raise ValueError(f"loss of {name} {loss}, {BASELINE} {losses[BASELINE]}: they must differ by at most 1 %")


def baselines(seconds: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """Who each candidate is compared with: our BF16, which itself is compared with transformers' faster one."""
    others = [name for name in seconds if name.startswith(f"transformers {BASELINE}")]
    chosen = {name: BASELINE for name in seconds if name != BASELINE}
    return chosen | ({BASELINE: min(others, key=lambda name: summarize(seconds[name]).median)} if others else {})


def add_records(report: Report, what: str, shape: str, tokens: int, seconds: Mapping[str, Sequence[float]]) -> None:
    """Time, fastest trial and throughput of each candidate."""
    beside = baselines(seconds)
    for name, times in seconds.items():
        other = beside.get(name)
        baseline = None if other is None else f"{what} {other}"
        ratio = None if other is None else paired_ratio(times, seconds[other])
        least = None if other is None else min(times) / min(seconds[other])
        median = summarize(times).median
        report.add(f"{what} {name}", shape, "time", median * 1e3, "ms", baseline=baseline, ratio=ratio)
        report.add(f"{what} {name}", shape, "fastest", min(times) * 1e3, "ms", baseline=baseline, ratio=least)
        report.add(f"{what} {name}", shape, "throughput", tokens / median, "tokens/s")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; write the records where asked."""
    parser = make_parser("Time of a training step, and of forward and backward", settings=True, repeats=9, warmup=1)
    arguments = parse_arguments(parser, argv)
    device, settings = arguments.device, arguments.settings
    report = Report(device, json_path=arguments.json)
    timed = partial(alternate, device=device, trials=arguments.repeats, warmup=arguments.warmup)
    with tempfile.TemporaryDirectory() as folder:
        try:
            from fp8moe.train.step import train_step

            ready = runs(settings, device.type, Path(folder))
        except ModuleNotFoundError as missing:
            print(f"bench_step needs the trainer's packages and {missing.name} is not installed: nothing was measured")
            return
        steps = timed({precision: partial(train_step, run) for precision, run in ready.items()})
        config = ready[BASELINE].config
        calls = alone(runs([*settings, "model.mtp_depth=0"], device.type, Path(folder)))
        check_losses(calls)
        passes = timed(calls)
    tokens = config.batch.sequences * config.seq_len
    shape = f"{config.model.dim}x{config.model.num_layers} E{config.model.experts.num_experts} T{tokens}"
    add_records(report, "step", shape, tokens, steps)
    add_records(report, "forward+backward", shape, tokens, passes)
    report.finish()


if __name__ == "__main__":
    main()
