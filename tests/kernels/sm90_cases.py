"""What is launched for the compile gate: each op of each device back end, at shapes that choose every production tile.

Tensors are never read, so they are unfilled; sizes are production's where the choice of a tile looks at them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import E4M3, Fp8Tensor, scale_shape

Case = tuple[str, Callable[[], Any]]
# M, N, K of one shape of each class that fp8moe.kernels.tiles knows.
SHAPES = {
    "few_short": (512, 2048, 2048),
    "few_long": (512, 2048, 7168),
    "many_short": (4096, 7168, 2048),
    "many_long": (4096, 4096, 7168),
}
GROUPS = 4


def rows(m: int, k: int) -> Fp8Tensor:
    """Unfilled FP8 rows (or columns) with M-major scales."""
    scale = torch.empty(scale_shape((m, k), (1, 128))[::-1])
    return Fp8Tensor(torch.empty(m, k, dtype=E4M3), scale.t())


def blocks(*shape: int) -> Fp8Tensor:
    """Unfilled FP8 weight blocks."""
    return Fp8Tensor(torch.empty(shape, dtype=E4M3), torch.empty(scale_shape(shape, (128, 128))), (128, 128))


def offsets() -> Tensor:
    return torch.zeros(GROUPS + 1, dtype=torch.int32)


def gemm_cases(backend: str) -> Iterator[Case]:
    """gemm, grouped_gemm and grouped_wgrad in every shape class, output dtype and epilogue."""
    gemm = importlib.import_module(f"fp8moe.kernels.{backend}.gemm").gemm
    grouped_gemm = importlib.import_module(f"fp8moe.kernels.{backend}.grouped_gemm").grouped_gemm
    grouped_wgrad = importlib.import_module(f"fp8moe.kernels.{backend}.grouped_wgrad").grouped_wgrad
    for m, n, k in SHAPES.values():
        for dtype in (torch.bfloat16, torch.float32):
            kind = "bf16" if dtype is torch.bfloat16 else "fp32"
            yield f"{backend} gemm {kind}", partial(gemm, rows(m, k), blocks(n, k), out_dtype=dtype)
            yield f"{backend} gemm_columns {kind}", partial(gemm, rows(m, k), rows(n, k), out_dtype=dtype)
            yield (
                f"{backend} grouped_gemm {kind}",
                partial(grouped_gemm, rows(m, k), blocks(GROUPS, n // GROUPS, k), offsets(), out_dtype=dtype),
            )
        total = torch.empty(m, n)
        yield f"{backend} gemm add", partial(gemm, rows(m, k), blocks(n, k), accumulate=total)
        yield f"{backend} gemm_columns add", partial(gemm, rows(m, k), rows(n, k), accumulate=total)
        grads = torch.empty(GROUPS, m // GROUPS, n)
        columns = rows(m // GROUPS, k * GROUPS), rows(n, k * GROUPS)
        yield f"{backend} grouped_wgrad add", partial(grouped_wgrad, *columns, offsets(), grads)


def cast_cases() -> Iterator[Case]:
    """Every cast, from BF16 and from FP32, with both kinds of scales."""
    quantize = importlib.import_module("fp8moe.kernels.triton.quantize")
    e5m6 = importlib.import_module("fp8moe.kernels.triton.e5m6")
    m, k = 4096, 7168
    for dtype, kind in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for power_of_two in (False, True):
            label = f"{kind} {'pow2' if power_of_two else 'fp32scale'}"
            for name in ("quantize_rows", "quantize_columns", "quantize_rows_and_columns"):
                cast = partial(getattr(quantize, name), torch.empty(m, k, dtype=dtype), power_of_two=power_of_two)
                yield f"triton {name} {label}", cast
            weight = torch.empty(GROUPS, 256, k, dtype=dtype)
            yield (
                f"triton quantize_blocks {label}",
                partial(quantize.quantize_blocks, weight, power_of_two=power_of_two),
            )
    yield "triton requantize_columns", partial(quantize.requantize_columns, rows(m, k))
    values = torch.empty(m, k, dtype=torch.bfloat16)
    yield "triton pack_e5m6 bf16", partial(e5m6.pack_e5m6, values)
    yield "triton e5m6", partial(_unpack, e5m6, values)


def _unpack(e5m6: Any, values: Tensor) -> None:
    packed = e5m6.pack_e5m6(values)
    e5m6.unpack_e5m6(packed)
    e5m6.e5m6_to_columns(packed)


def wgrad_cases() -> Iterator[Case]:
    """The unquantized weight gradient, of BF16 and of FP32 operands."""
    wgrad = importlib.import_module("fp8moe.kernels.triton.gemm").wgrad
    for dtype, kind in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        operands = torch.empty(4096, 256, dtype=dtype), torch.empty(4096, 7168, dtype=dtype)
        yield f"triton wgrad {kind}", partial(wgrad, *operands, torch.empty(256, 7168))


def cases() -> Iterator[Case]:
    """All cases of both device back ends."""
    yield from gemm_cases("gluon")
    yield from gemm_cases("triton")
    yield from wgrad_cases()
    yield from cast_cases()


CASES = tuple(cases())
