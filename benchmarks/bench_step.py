"""A whole training step in FP8, BF16 and FP32: forward, backward, clip, update, quantization of the weights.

One process with all experts, the model and batch of the quickstart. The three runs are alternated step by step and
start from the same weights on the same data. On a CPU FP8 is emulated bit by bit and costs more than BF16; the aim is a
ratio below 4. Settings (`model.dim=512`) may follow the options.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import Report, alternate, make_parser, paired_ratio, parse_arguments, summarize

if TYPE_CHECKING:
    from fp8moe.train.build import Run

PRECISIONS = ("bf16", "fp8", "fp32")
BASELINE = "bf16"


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


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; write the records where asked."""
    parser = make_parser("Time of a training step: FP8 against BF16 and FP32", settings=True, repeats=9, warmup=1)
    arguments = parse_arguments(parser, argv)
    report = Report(arguments.device, json_path=arguments.json)
    with tempfile.TemporaryDirectory() as folder:
        try:
            from fp8moe.train.step import train_step

            ready = runs(arguments.settings, arguments.device.type, Path(folder))
        except ModuleNotFoundError as missing:
            print(f"bench_step needs the trainer's packages and {missing.name} is not installed: nothing was measured")
            return
        steps = {precision: partial(train_step, run) for precision, run in ready.items()}
        seconds = alternate(steps, arguments.device, trials=arguments.repeats, warmup=arguments.warmup)
    config = ready[BASELINE].config
    tokens = config.batch.sequences * config.seq_len
    shape = f"{config.model.dim}x{config.model.num_layers} E{config.model.experts.num_experts} T{tokens}"
    for precision, times in seconds.items():
        median = summarize(times).median
        ratio = None if precision == BASELINE else paired_ratio(times, seconds[BASELINE])
        baseline = None if ratio is None else f"step {BASELINE}"
        report.add(f"step {precision}", shape, "time", median * 1e3, "ms", baseline=baseline, ratio=ratio)
        report.add(f"step {precision}", shape, "throughput", tokens / median, "tokens/s")
    report.finish()


if __name__ == "__main__":
    main()
