"""A BF16 and an FP8 GEMM: right everywhere, and on a GPU as fast as on the card that the records were taken on.

Right: the FP8 product of small operands beside the FP64 product of the same codes and scales. Fast: TFLOPS of
M4096 N4096 K7168 (an attention projection of DeepSeek-V3) beside those of `benchmarks/results/gemm-h100.json`, by back
end; H100, H200 and H800 have the same tensor cores. On a CPU speed says nothing and is not measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from fp8moe.doctor.finding import Finding, Level
from fp8moe.doctor.odd import odd_ones
from fp8moe.kernels import backend
from fp8moe.kernels.gemm import gemm
from fp8moe.kernels.quantize import quantize_blocks, quantize_rows
from fp8moe.parallel.place import rank_in_words

PART = "gemm"
M, N, K = 4096, 4096, 7168
RECORDS = {"bf16": 806.0, "gluon": 1308.0, "triton": 839.0, "cublas": 1264.0}  # TFLOPS
LEAST_SHARE = 0.8  # of a record
SMALL = (128, 128, 256)
MOST_ERROR = 4e-3  # of the norm: BF16 rounds by up to 2^-9; FP8's tensor cores keep 14 bits within 128 of K
WARM_UP, REPEATS = 3, 10


def check_correct(device: torch.device) -> list[Finding]:
    """Whether a BF16 product, and the FP8 GEMM of the back end in force, are right on `device`."""
    fp8 = f"FP8 by {backend.provider('gemm', backend.resolve(device))}"
    return [_judged("BF16", _bf16_error, device), _judged(fp8, _fp8_error, device)]


def _judged(what: str, error_of: Callable[[torch.device], float], device: torch.device) -> Finding:
    try:
        error = error_of(device)
    except Exception as failed:  # of a compiler, a driver, a package: whatever it is, it is the finding
        reason = " ".join(str(failed).split())[:160]
        fix = f"run on another back end ({backend.VARIABLE}=reference runs everywhere); `make test-gpu` shows the error"
        return Finding(PART, f"{what} fails: {type(failed).__name__}: {reason}", Level.STOP, fix)
    text = f"{what}: relative error {error:.1e}"
    if error <= MOST_ERROR:
        return Finding(PART, text)
    fix = "run `make test-gpu` on this machine: where it fails on one GPU alone, have that GPU replaced"
    return Finding(PART, f"{text}, and at most {MOST_ERROR:g} is right", Level.STOP, fix)


def _operands(device: torch.device, m: int, n: int, k: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, k, generator=generator).to(device, torch.bfloat16) for rows in (m, n)]


def _bf16_error(device: torch.device) -> float:
    a, b = _operands(device, *SMALL)
    return _distance((a @ b.T).double(), a.double() @ b.double().T)


def _fp8_error(device: torch.device) -> float:
    a, b = _operands(device, *SMALL)
    x, w = quantize_rows(a), quantize_blocks(b)[0]
    return _distance(gemm(x, w, out_dtype=torch.float32).double(), x.dequantize().double() @ w.dequantize().double().T)


def _distance(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference by the norm of `exact`; infinite where it is not a number."""
    error = float((found - exact).norm() / exact.norm())
    return error if math.isfinite(error) else math.inf


def speeds(device: torch.device) -> dict[str, float]:
    """TFLOPS of the product in BF16 ("bf16") and in FP8 (by its back end's name); nothing on a CPU."""
    if device.type != "cuda":
        return {}
    a, b = _operands(device, M, N, K)
    x, w = quantize_rows(a), quantize_blocks(b)[0]
    name = backend.provider("gemm", backend.resolve(device))
    calls: dict[str, Callable[[], object]] = {"bf16": lambda: a @ b.T, name: lambda: gemm(x, w)}
    return {key: 2 * M * N * K / _seconds(call) / 1e12 for key, call in calls.items()}


def _seconds(call: Callable[[], object]) -> float:
    times = []
    for number in range(WARM_UP + REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if number >= WARM_UP:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def check_speeds(of_ranks: list[dict[str, float]], *, hopper: bool) -> list[Finding]:
    """Lines on every rank's TFLOPS: beside the records, and the odd ranks. For rank 0 to say."""
    lines = []
    for name in of_ranks[0]:
        found = {rank: one[name] for rank, one in enumerate(of_ranks) if name in one}
        middle, record = statistics.median(found.values()), RECORDS.get(name)
        what = "BF16" if name == "bf16" else f"FP8 by {name}"
        beside = f", {100 * middle / record:.0f} % of the record of an H100" if record and hopper else ""
        text = f"{what}, M{M} N{N} K{K}: {middle:.0f} TFLOPS{beside}"
        lines.append(Finding(PART, text))
        if record and hopper and middle < LEAST_SHARE * record:
            fix = "see clocks, power and temperature under load (`nvidia-smi -q -d CLOCK,POWER,PERFORMANCE`)"
            lines.append(
                Finding(PART, f"{what} should give {record:.0f} TFLOPS and gives {middle:.0f}", Level.ADVICE, fix)
            )
        for rank, share in odd_ones(found).items():
            fix = f"leave {rank_in_words(rank)} out, or have its GPU looked at (`nvidia-smi -q -d PERFORMANCE`)"
            text = f"{rank_in_words(rank)} is odd: {what} at {100 * share:.0f} % of the others' speed"
            lines.append(Finding(PART, text, Level.ADVICE, fix))
    return lines
