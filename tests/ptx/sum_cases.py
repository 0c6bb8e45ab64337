"""FP8 GEMMs under the tensor core's own sums, of 13 fraction bits: what promotion keeps, and what its loss would cost.

Every FP8 kernel runs as compiled, on positive numbers (truncation adds up there) and the contraction of 4,096 at which
the DeepSeek-V3 report (section 3.3.2) found errors of nearly 2 %; where the codes' scales are powers of two, what it
gives is to the bit what `emulated_gemm` does. Then two kernels run with promotion taken out of their machine code: the
first product of every step keeps the sum, and the scale of every step but the last is 0, so that what leaves the tensor
core is one sum over all of K. With FP32's sums such a kernel is right, which shows that the edit does just that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fp8moe.kernels import tiles
from fp8moe.kernels.backend import limited_sms
from fp8moe.kernels.fp8 import BLOCK_TILE, E4M3, Fp8Tensor, scale_shape
from tests.kernels.sm90_cases import chosen
from tests.kernels.tensor_core import FRACTION_BITS, emulated_gemm
from tests.ptx.launching import Machine, on_machine
from tests.ptx.moving_cases import ops
from tests.ptx.plants import matches
from tests.ptx.product_cases import MODULES

M, N, K = 128, 128, 4096
COMPARED = 12  # rows and columns that are emulated, which takes FP64 and time
SCALE = 2.0**-4
OPS = ("gemm", "gemm_columns", "grouped_gemm", "grouped_wgrad")
ONE_WAVE = ("gluon gemm", "triton gemm")  # a consumer's only product of a step, which the edit can keep


def operand(rows: int, tile: tuple[int, int] = (1, 128), *, last_only: bool = False) -> Fp8Tensor:
    """Positive codes [rows, K] and one scale for all; zero for all of K but the last 128 where `last_only`."""
    scale = torch.full(scale_shape((rows, K), tile), SCALE)
    if last_only:
        scale[:, :-1] = 0
    return Fp8Tensor((torch.rand(rows, K) * 448).to(E4M3), scale, tile)


def run(machine: Machine, backend: str, op: str, a: Fp8Tensor, b: Fp8Tensor) -> Tensor:
    """a @ b^T [M, N] in FP32, as the kernel's only output tile or group."""
    call, at = getattr(ops(backend, MODULES.get(op, op)), op.removesuffix("_columns")), torch.tensor([0, M]).int()
    tile = next(one for one in tiles.production_tiles(backend, op) if not one.multicast and one.block_m <= 256)
    if f"{backend} {op}" in ONE_WAVE:
        tile = next(one for one in tiles.production_tiles(backend, op) if (one.block_m, one.block_n) == (M, N))
    with chosen(tile), limited_sms(1), on_machine(machine):
        if op == "grouped_gemm":
            return call(a, replace(b, data=b.data[None], scale=b.scale[None]), at, out_dtype=torch.float32)
        if op == "grouped_wgrad":
            total = torch.zeros(1, M, N)
            call(a, b, torch.tensor([0, K]).int(), total)
            return total[0]
        return call(a, b, out_dtype=torch.float32)


def one_sum(text: str) -> str:
    """The kernel without promotion: sums start at zero, and the first product of a step adds to them like the rest."""
    firsts = {}
    for match in matches(text, r"wgmma\.mma_async[^;]*?\{([^}]*)\}, %rd\d+, %rd\d+, (%p\d+|0)\b"):
        firsts.setdefault(match[1], match)
    for match in sorted(firsts.values(), key=lambda one: -one.start()):
        kept = match[0].removesuffix(match[2]) + "kept"
        end = text.index(";", match.end()) + 1
        scope = f"{{\n.reg .pred kept;\nmov.pred kept, -1;\n{kept}{text[match.end() : end]}\n}}\n"
        text = text[: match.start()] + scope + text[end:]
    entry = matches(text, r"\n\tld\.param")[0].start()
    zeros = "".join(f"\n\tmov.b32 {name.strip()}, 0f00000000;" for sums in firsts for name in sums.split(","))
    return text[:entry] + zeros + text[entry:]


def error(got: Tensor, a: Fp8Tensor, b: Fp8Tensor) -> float:
    """The largest relative error against FP64."""
    exact = a.dequantize().double() @ b.dequantize().double().T
    return float(((got.double() - exact) / exact).abs().max())


def sums(machine: Machine, backend: str) -> dict[str, dict[str, Any]]:
    """Kernel -> its errors: `promoted` as compiled, `one_sum` without promotion, and that in FP32, `one_sum_fp32`."""
    found: dict[str, dict[str, Any]] = {}
    machine.seed, machine.count = None, False
    for op in OPS:
        torch.manual_seed(0)
        b_tile = BLOCK_TILE if op in ("gemm", "grouped_gemm") else (1, 128)
        a, b = operand(M), operand(N, b_tile)
        row: dict[str, Any] = {}
        try:
            machine.fraction_bits = FRACTION_BITS
            got = run(machine, backend, op, a, b)
            part = [replace(one, data=one.data[:COMPARED], scale=one.scale[:COMPARED]) for one in (a, b)]
            row["as emulated"] = torch.equal(got[:COMPARED, :COMPARED], emulated_gemm(*part))
            row["promoted"] = error(got, a, b)
            if f"{backend} {op}" in ONE_WAVE:
                machine.edit = one_sum
                last = operand(M, last_only=True)
                last = replace(last, data=a.data)
                row["one sum"] = error(run(machine, backend, op, last, b), a, b)
                machine.fraction_bits = None
                row["one sum in FP32"] = error(run(machine, backend, op, last, b), a, b)
        finally:
            machine.fraction_bits = machine.edit = None
        found[f"{backend} {op}"] = row
    machine.launched = []
    return found
