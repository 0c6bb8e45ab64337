"""SwiGLU with its casts and without: bytes read and written a second, beside a copy and plain PyTorch in the same run.

    python -m benchmarks.bench_swiglu [--quick] [--device cpu] [--json FILE]

Bytes are those of the tensors that go in and come out, each once. The copy is of gate_up; the composition is the
specification without casts, compiled by torch.compile on a GPU and run as it is on a CPU.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.bandwidth import COPY, Entry, add_bandwidths, size_of
from benchmarks.contest import write_beside
from benchmarks.harness import Report, make_parser, parse_arguments
from fp8moe.kernels.reference import silu_mul as specified
from fp8moe.kernels.silu_mul import silu_mul, silu_mul_backward
from fp8moe.kernels.swiglu import swiglu, swiglu_backward, swiglu_columns

# Rows and F: DeepSeek-V3's routed experts, its dense layers, V2-Lite's experts and its dense layer (a short last tile).
SHAPES = ((32768, 2048), (8192, 18432), (32768, 1408), (8192, 10944))
SMALL = ((512, 256),)


def contestants(gate_up: Tensor, dy: Tensor, weights: Tensor) -> dict[str, Entry]:
    """Name -> (call, bytes it must read and write)."""
    _, cached = swiglu(gate_up, weights)
    forward, backward = specified.silu_mul, specified.silu_mul_backward
    if gate_up.is_cuda:
        forward, backward = torch.compile(forward), torch.compile(backward)
    calls: dict[str, tuple[Callable[[], object], tuple[object, ...]]] = {
        COPY: (gate_up.clone, (gate_up,)),
        "swiglu": (partial(swiglu, gate_up, weights), (gate_up, weights)),
        "swiglu_columns": (partial(swiglu_columns, cached, weights), (cached, weights)),
        "swiglu_backward": (partial(swiglu_backward, dy, cached, weights), (dy, cached, weights)),
        "silu_mul": (partial(silu_mul, gate_up, weights), (gate_up, weights)),
        "silu_mul, PyTorch": (partial(forward, gate_up, weights), (gate_up, weights)),
        "silu_mul_backward": (partial(silu_mul_backward, dy, gate_up, weights), (dy, gate_up, weights)),
        "silu_mul_backward, PyTorch": (partial(backward, dy, gate_up, weights), (dy, gate_up, weights)),
    }
    return {name: (call, size_of(given) + size_of(call())) for name, (call, given) in calls.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    arguments = parse_arguments(make_parser("SwiGLU: GB/s of every op beside a copy"), argv)
    device = arguments.device
    report = Report(device, json_path=arguments.json)
    shapes = SHAPES if device.type == "cuda" else SMALL
    for r, f in shapes[:1] if arguments.quick else shapes:
        generator = torch.Generator(device).manual_seed(0)
        gate_up, dy = (torch.randn(r, width, generator=generator, device=device).bfloat16() for width in (2 * f, f))
        entries = contestants(gate_up, dy, torch.rand(r, generator=generator, device=device))
        add_bandwidths(report, entries, f"R{r} F{f}", arguments)
    report.finish()
    if arguments.json is not None:
        write_beside(report.records, arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
