"""Is what a GPU computes right, before anybody asks how fast: the first part of `make bench-gpu`.

    python -m benchmarks.correctness [--repeats 1000]

    one SM        the persistent GEMMs on a single SM, where a wrong parity of a barrier hangs or reads a stale tile,
                  against FP64 of the same operands
    repetition    every op again and again on equal input: each result has the bits of the first. A load that races with
                  its pipeline gives one wrong result in many
    memcheck      compute-sanitizer over the kernels' tests, on a GPU where it is installed

Exit code 1 when anything differs. It needs torch, Triton and NumPy, and pytest for memcheck.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import make_parser, parse_arguments
from fp8moe.kernels.backend import limited_sms
from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.gemm import gemm
from fp8moe.kernels.grouped_gemm import grouped_gemm, grouped_wgrad
from fp8moe.kernels.quantize import quantize_blocks, quantize_columns, quantize_rows
from tests.distance import calc_diff

ROOT = Path(__file__).resolve().parent.parent
MEMCHECK = ("tests/kernels/test_triton_hardware.py", "-k", "outside")
ONE_SM = (512, 512, 1024)  # M, N, K of a product that one SM does in a moment
BF16_BOUND, FP32_BOUND = 5e-6, 3e-7  # kernels/README.md, Tolerances


def products(device: torch.device) -> dict[str, tuple[Callable[[], Tensor], Tensor, Fp8Tensor, Fp8Tensor, float]]:
    """Name -> (call, its exact result in FP64, its two operands, bound) of each kind of FP8 product."""
    m, n, k = ONE_SM
    generator = torch.Generator(device).manual_seed(0)
    x, w, dy = (torch.randn(*size, generator=generator, device=device) for size in ((m, k), (n, k), (m, n)))
    rows, (blocks, _) = quantize_rows(x), quantize_blocks(w)
    dy_columns, x_columns = quantize_columns(dy), quantize_columns(x)
    offsets = torch.tensor([0, m], dtype=torch.int32, device=device)
    experts = Fp8Tensor(blocks.data[None], blocks.scale[None], blocks.tile)

    def added() -> Tensor:
        total = torch.zeros(1, n, k, device=device)
        grouped_wgrad(dy_columns, x_columns, offsets, total)
        return total[0]

    def backward_product() -> Tensor:
        return gemm(dy_columns, x_columns, out_dtype=torch.float32)

    forward, backward = _exact(rows, blocks), _exact(dy_columns, x_columns)
    return {
        "gemm": (lambda: gemm(rows, blocks), forward, rows, blocks, BF16_BOUND),
        "gemm wgrad": (backward_product, backward, dy_columns, x_columns, FP32_BOUND),
        "grouped_gemm": (lambda: grouped_gemm(rows, experts, offsets), forward, rows, blocks, BF16_BOUND),
        "grouped_wgrad": (added, backward, dy_columns, x_columns, FP32_BOUND),
    }


def _exact(a: Fp8Tensor, b: Fp8Tensor) -> Tensor:
    return a.dequantize().double() @ b.dequantize().double().T


def differing(call: Callable[[], Tensor], repeats: int) -> int:
    """In how many of `repeats` calls the result has other bits than the first call's. Waits once, at the end."""
    first = call().clone().view(torch.uint8)
    changed = torch.zeros((), dtype=torch.int64, device=first.device)
    for _ in range(repeats):
        changed += (call().view(torch.uint8) != first).any()
    return int(changed)


def check_products(device: torch.device, repeats: int) -> list[str]:
    """One line for every product: its error on one SM and on all, and how many repetitions differ; bad ones say so."""
    lines = []
    for name, (call, exact, a, b, bound) in products(device).items():
        with limited_sms(1):
            alone = call()
        everywhere = call()
        error = calc_diff(alone, exact, a.dequantize(), b.dequantize())
        same, changed = torch.equal(alone, everywhere), differing(call, repeats)
        right = same and changed == 0 and error <= bound
        lines.append(
            f"{'ok   ' if right else 'WRONG'} {name}: error {error:.1e} (bound {bound:.0e}), "
            f"{'equal' if same else 'NOT equal'} on one SM and on all, {changed} of {repeats} repetitions differ"
        )
    return lines


def memcheck() -> str:
    """One line: whether a kernel of the tests touches memory outside its tensors, or that nobody looked."""
    if shutil.which("compute-sanitizer") is None:
        return "left  memcheck: compute-sanitizer is not installed"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *MEMCHECK]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]
    return f"{'ok   ' if done.returncode == 0 else 'WRONG'} memcheck: {last}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line a check; 1 where one fails."""
    arguments = parse_arguments(make_parser("Correctness of the products on a GPU", repeats=1000), argv)
    lines = check_products(arguments.device, arguments.repeats)
    if arguments.device.type == "cuda":
        lines.append(memcheck())
    print("\n".join(lines))
    return int(any(line.startswith("WRONG") for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
