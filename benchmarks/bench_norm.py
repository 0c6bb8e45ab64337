"""RMSNorm: bytes read and written a second, beside a plain copy and beside PyTorch's norm in the same run.

    python -m benchmarks.bench_norm [--quick] [--json FILE]

What is counted is what must move: x, dx and gradients once, codes and scales once. `torch` entries are the composition
that each op replaces, as PyTorch runs it (`rms_norm`, its autograd, a sum, `quantize_*`), counted with the bytes of the
one. The ratio is bytes a second over those of a plain copy of x. A name begins with the back end that ran: on a CPU
that is the reference, whose figures say how long a test takes and nothing about a GPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import rms_norm as torch_norm

from benchmarks.bandwidth import COPY, Entry, add_bandwidths, size_of
from benchmarks.contest import write_beside
from benchmarks.harness import Report, make_parser, parse_arguments
from fp8moe.kernels import backend
from fp8moe.kernels.norm import rms_norm, rms_norm_backward, rms_norm_columns
from fp8moe.kernels.quantize import quantize_columns, quantize_rows

SUBJECT = "RMSNorm"
EPS = 1e-6
# Tokens, width, distance of rows: the residual stream, both latents as column slices; the CPU's.
SIZES = {
    "cuda": ((4096, 7168, 7168), (4096, 1536, 2112), (4096, 512, 2112), (16384, 2048, 2048)),
    "cpu": ((512, 1536, 2112),),
}


def forwards(x: Tensor, weight: Tensor, delta: Tensor) -> dict[str, Entry]:
    """Name -> (call, bytes) of what a forward and its recomputation launch."""
    wide, shape = size_of(delta), weight.shape
    _, _, rows, inverse = rms_norm(x, weight, eps=EPS, rows=True, power_of_two=True)
    narrow, numbers = size_of(rows), size_of(inverse)

    def both() -> object:
        return rms_norm(x, weight, delta, eps=EPS, rows=True, power_of_two=True)

    def torch_both() -> object:
        h = x + delta
        y = torch_norm(h, shape, weight, EPS)
        return h, y, quantize_rows(y, power_of_two=True)

    return {
        "tensor": (lambda: rms_norm(x, weight, eps=EPS), 2 * wide + numbers),
        "torch tensor": (lambda: torch_norm(x, shape, weight, EPS), 2 * wide + numbers),
        "rows": (lambda: rms_norm(x, weight, eps=EPS, tensor=False, rows=True), wide + narrow + numbers),
        "torch rows": (lambda: quantize_rows(torch_norm(x, shape, weight, EPS)), wide + narrow + numbers),
        "residual, tensor, rows": (both, 4 * wide + narrow + numbers),
        "torch residual, tensor, rows": (torch_both, 4 * wide + narrow + numbers),
        "columns": (lambda: rms_norm_columns(x, weight, inverse), wide + narrow + numbers),
        "torch columns": (lambda: quantize_columns(torch_norm(x, shape, weight, EPS)), wide + narrow + numbers),
    }


def backwards(x: Tensor, weight: Tensor, delta: Tensor) -> dict[str, Entry]:
    """The same of a backward, with the residual's gradient; `delta` stands in for both gradients."""
    wide, main_grad = size_of(delta), torch.zeros(weight.shape, device=x.device)
    inverse = rms_norm(x, weight, eps=EPS)[3]
    source, gain = x.detach().requires_grad_(), weight.detach().clone().requires_grad_()

    def torch_backward() -> object:  # with its forward, which makes the graph
        y = torch_norm(source, weight.shape, gain, EPS)
        dx, d_gain = torch.autograd.grad(y, (source, gain), delta)
        main_grad.add_(d_gain)
        return dx + delta

    return {
        "backward": (
            lambda: rms_norm_backward(delta, x, weight, inverse, main_grad, delta),
            4 * wide + size_of(inverse),
        ),
        "torch forward and backward": (torch_backward, 6 * wide + size_of(inverse)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    arguments = parse_arguments(make_parser(f"{SUBJECT}: GB/s beside a copy and PyTorch's norm"), argv)
    device = arguments.device
    report = Report(device, json_path=arguments.json)
    runs = backend.provider("rms_norm", backend.resolve(device))
    sizes = SIZES[device.type]
    for t, d, distance in sizes[:1] if arguments.quick else sizes:
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(t, distance, generator=generator, device=device).bfloat16()[:, :d]
        delta = torch.randn(t, d, generator=generator, device=device).bfloat16()
        weight = torch.ones(d, device=device, dtype=torch.bfloat16)
        copied: dict[str, Entry] = {COPY: (delta.clone, 2 * size_of(delta))}
        entries = copied | forwards(x, weight, delta) | backwards(x, weight, delta)
        composed = [name for name in entries if name.startswith("torch")]
        add_bandwidths(report, entries, f"T{t} D{d}", arguments, runs, composed)
    report.finish()
    if arguments.json is not None:
        write_beside(report.records, arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
