"""The optimizer: bytes moved a second, beside a plain copy, torch's fused AdamW and a loop over parameters in one run.

    python -m benchmarks.bench_adamw [--quick] [--json FILE]

What is counted is what must be moved. `adamw_step` reads gradient, master and two BF16 moments and writes master,
moments and BF16 weight: 22 bytes a parameter. `adamw_step_quantize` writes codes and scales of both orientations too,
24 bytes; `two passes` is the update and then `quantize_blocks`, and is counted with the bytes of the one, so that the
ratio of their bandwidths is that of their times. `loop` is the specification's update of each parameter, chunk by
chunk, and a cast of each: what one pass replaces. torch's fused AdamW keeps FP32 moments and writes no BF16 weight: 28
bytes. The ratio is to a copy's bytes a second. A name begins with the back end that ran: on a CPU that is the
reference, whose figures say nothing about a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.bandwidth import COPY, Entry, add_bandwidths, size_of
from benchmarks.contest import write_beside
from benchmarks.harness import Report, make_parser, parse_arguments
from fp8moe.kernels import backend
from fp8moe.kernels.adamw import adamw_step, adamw_step_quantize
from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.quantize import quantize_blocks
from fp8moe.kernels.reference import adamw as specification
from fp8moe.kernels.segments import Segments
from fp8moe.kernels.squared_norm import squared_norm

SUBJECT = "The optimizer"
LOOP, TORCH, TORCH_NORM = "loop", "torch fused AdamW", "torch vector_norm fp64"
SETTINGS: dict[str, Any] = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 10}
# Weights [experts, N, K] of one mixture layer on a rank: gate + up and down.
SIZES = {
    "cuda": (((4, 4096, 7168), (4, 7168, 2048)), ((32, 512, 1024), (32, 1024, 256))),
    "cpu": (((2, 256, 256),),),
}


@dataclass(frozen=True)
class Weights:
    """The state of some weights, end to end in flat buffers, and the FP8 blocks of each."""

    shapes: Sequence[tuple[int, int, int]]
    state: tuple[Tensor, Tensor, Tensor, Tensor]  # master, gradient, moments
    weight: Tensor
    blocks: list[tuple[Fp8Tensor, Fp8Tensor]]

    @classmethod
    def make(cls, shapes: Sequence[tuple[int, int, int]], device: torch.device) -> "Weights":
        n = sum(e * rows * columns for e, rows, columns in shapes)
        generator = torch.Generator(device).manual_seed(0)
        master, grad = (torch.randn(n, generator=generator, device=device) * 0.02 for _ in range(2))
        exp_avg, exp_avg_sq = (torch.zeros(n, dtype=torch.bfloat16, device=device) for _ in range(2))
        made = cls(shapes, (master, grad, exp_avg, exp_avg_sq), master.bfloat16(), [])
        made.blocks.extend(quantize_blocks(weight) for *_, weight in made.parts())
        return made

    def parts(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """(master, gradient, moments, weight) of each weight, in its shape."""
        found, start = [], 0
        for e, rows, columns in self.shapes:
            values, shape = slice(start, start + e * rows * columns), (e, rows, columns)
            start = values.stop
            master, grad, exp_avg, exp_avg_sq = (tensor[values].view(shape) for tensor in self.state)
            found.append((master, grad, exp_avg, exp_avg_sq, self.weight[values].view(shape)))
        return found


def updates(x: Weights) -> dict[str, Entry]:
    """Name -> (call, bytes it must read and write)."""
    master, grad = x.state[:2]
    n, scale = master.numel(), torch.ones((), device=master.device)
    segments = Segments.of([(0, n, True)], master.device)
    parameter = torch.nn.Parameter(master.clone())
    parameter.grad = grad
    optimizer = torch.optim.AdamW([parameter], lr=1e-4, fused=True)
    flat = 2 * size_of(master) + size_of(grad) + 4 * size_of(x.state[2]) + size_of(x.weight)
    with_blocks = flat + sum(size_of(q) for both in x.blocks for q in both)

    def fused() -> None:
        for part, both in zip(x.parts(), x.blocks, strict=True):
            adamw_step_quantize(*part, *both, **SETTINGS, grad_scale=scale)

    def two_passes() -> None:
        adamw_step(*x.state, segments, x.weight, **SETTINGS, grad_scale=scale)
        for part in x.parts():
            quantize_blocks(part[-1])

    def loop() -> None:
        for master, grad, exp_avg, exp_avg_sq, weight in x.parts():
            whole = Segments(((0, weight.numel(), True),), segments.parts)
            state = (master.view(-1), grad.view(-1), exp_avg.view(-1), exp_avg_sq.view(-1))
            specification.adamw_step(*state, whole, **SETTINGS, grad_scale=scale)
            weight.copy_(master)
            quantize_blocks(weight)

    return {
        COPY: (lambda: master.clone(), 2 * size_of(master)),
        "adamw_step": (lambda: adamw_step(*x.state, segments, x.weight, **SETTINGS, grad_scale=scale), flat),
        "adamw_step_quantize": (fused, with_blocks),
        "two passes": (two_passes, with_blocks),
        LOOP: (loop, with_blocks),
        TORCH: (optimizer.step, 7 * size_of(master)),
        "squared_norm": (lambda: squared_norm(grad), size_of(grad)),
        TORCH_NORM: (lambda: torch.linalg.vector_norm(grad, dtype=torch.float64), size_of(grad)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    arguments = parse_arguments(make_parser(f"{SUBJECT}: GB/s beside a copy and torch's"), argv)
    device = arguments.device
    report = Report(device, json_path=arguments.json)
    runs = backend.provider("adamw_step", backend.resolve(device))
    sizes = SIZES[device.type]
    for shapes in sizes[-1:] if arguments.quick else sizes:
        entries = updates(Weights.make(shapes, device))
        label = " + ".join("x".join(map(str, shape)) for shape in shapes)
        add_bandwidths(report, entries, label, arguments, runs, (LOOP, TORCH, TORCH_NORM))
    report.finish()
    if arguments.json is not None:
        write_beside(report.records, arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
