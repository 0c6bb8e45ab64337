"""One whole layer, forward, backward and weight gradients: FP8 beside BF16, and where its time goes.

    python -m benchmarks.bench_layer [--layers dsv3 dsv2_lite] [--tokens 4096 16384] [--sequence 4096]

A layer is a mixture block with its attention, on one GPU that holds all of its experts (`layers`): DeepSeek-V3's with
32 experts instead of 256, as many rows as a rank of its cluster receives; DeepSeek-V2-Lite's with its 64; and the
mixture of Qwen3-30B-A3B, 128 experts of 768, under V2-Lite's attention, since its own is no part of this project.
The tokens are one sequence, or sequences of `--sequence` tokens, as a micro-batch of several has them: attention's
share grows with the sequence. Routing is the router's own on random weights. Times are device time, FP8 and BF16
alternated; BF16 is this project's: cuBLAS, torch's grouped products, the same fused kernels around them. Shares come
from one call under torch.profiler. On a CPU a small layer runs the same code.

Where the host may be slower than the kernels, at 4,096 tokens or fewer, each is also timed as a CUDA graph, named "fp8
graph": what `parallel.cuda_graphs` gains, beside the same layer launched by the host.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from benchmarks.harness import Report, alternate, make_parser, paired_ratio, parse_arguments, summarize
from benchmarks.kernel_shares import OTHER, shares
from benchmarks.layers import LAYERS, LayerStep, layer_flops
from fp8moe.layers.cuda_graph import Captured, Graph, cuda_graphs
from fp8moe.layers.recipe import Precision
from fp8moe.model.config import ModelConfig

PRECISIONS = {"bf16": Precision.BF16, "fp8": Precision.FP8}
BASELINE = "bf16"
TOKENS = {"cuda": (4096, 16384), "cpu": (256,)}
CAPTURED_TOKENS = 4096  # at more of them kernels take longer than their launches, and activations would be there twice


def measure_layer(
    report: Report,
    name: str,
    config: ModelConfig,
    tokens: int,
    sequence: int | None,
    device: torch.device,
    repeats: int,
    warmup: int,
) -> None:
    """Add the layer's times, TFLOPS and ratio, and on a GPU its launches and the device time of each kind of work."""
    steps = {kind: LayerStep(config, precision, tokens, device, sequence) for kind, precision in PRECISIONS.items()}
    size = f"T{tokens}" if sequence in (None, tokens) else f"T{tokens} S{sequence}"
    shape, flops = f"{size} D{config.dim} E{config.experts.num_experts}", layer_flops(config, tokens, sequence)

    def add_times(candidates: Mapping[str, Callable[[], object]], kinds: Collection[str]) -> None:
        seconds = alternate(candidates, device, trials=repeats, warmup=warmup)
        for kind in kinds:
            label, median = f"{name} {kind}", summarize(seconds[kind]).median
            ratio = None if kind == BASELINE else paired_ratio(seconds[kind], seconds[BASELINE])
            baseline = None if ratio is None else f"{name} {BASELINE}"
            report.add(label, shape, "time", median * 1e3, "ms", baseline=baseline, ratio=ratio)
            report.add(label, shape, "throughput", flops / median / 1e12, "TFLOPS")

    add_times(steps, steps)
    if device.type != "cuda":
        return
    for kind, step in steps.items():
        _add_shares(report, f"{name} {kind}", shape, step)
    if tokens > CAPTURED_TOKENS:
        return
    try:
        graphs = as_captured(steps, cuda_graphs)
    except RuntimeError as error:  # the figures above stand
        print(f"{name} {shape}: not captured: {error}")
    else:
        add_times({BASELINE: steps[BASELINE], **graphs}, graphs)


def as_captured(
    steps: Mapping[str, Callable[[], object]], make_graphs: Callable[[], Callable[[], Graph]]
) -> dict[str, Callable[[], object]]:
    """Each step as a CUDA graph, "KIND graph"; it runs twice, the first time to compile its kernels."""
    graphs: dict[str, Callable[[], object]] = {}
    for kind, step in steps.items():
        step()
        graphs[f"{kind} graph"] = Captured(step, make_graphs()).replay
    return graphs


def _add_shares(report: Report, label: str, shape: str, step: LayerStep) -> None:
    found = shares(step)
    report.add(label, shape, "launches", found.launches, "kernels")
    for kind, seconds in found.seconds.items():
        report.add(label, shape, f"device time: {kind}", seconds * 1e3, "ms")
    if found.unknown:
        print(f"{label} {shape}: {OTHER} is {'; '.join(name[:60] for name in found.unknown)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; write the records where asked."""
    parser = make_parser("A whole layer, FP8 against BF16", repeats=9, warmup=2)
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="dsv3, dsv2_lite, qwen3_mixture; on a CPU: small")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="T", help="tokens of a call (4096 16384)")
    parser.add_argument("--sequence", type=int, metavar="S", help="tokens of a sequence (those of the call are one)")
    arguments = parse_arguments(parser, argv)
    device: torch.device = arguments.device
    known = LAYERS[device.type]
    names = arguments.layers or list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--layers {unknown[0]} is no layer of a {device.type} run: use {', '.join(known)}")
    sizes, sequence = arguments.tokens or TOKENS[device.type], arguments.sequence
    if sequence is not None and (sequence < 1 or any(tokens % sequence for tokens in sizes)):
        parser.error(f"--tokens {' '.join(map(str, sizes))} must be multiples of --sequence {sequence}")
    report = Report(device, json_path=arguments.json)
    for name in names:
        for tokens in sizes:
            measure_layer(report, name, known[name], tokens, sequence, device, arguments.repeats, arguments.warmup)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    report.finish()


if __name__ == "__main__":
    main()
