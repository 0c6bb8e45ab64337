"""Biases of experts on the machine: added, and both of their gradients, within FP32's rounding of FP64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import Fp8Tensor
from tests.ptx.launching import Machine, on_machine
from tests.ptx.moving_cases import DTYPES, Case, ops

RAGGED, ALIGNED, LONG = (3, 0, 70, 1), (128, 0, 128), (128, 0, 256)  # rows of each group; LONG: two tiles


def groups(machine: Machine, fp8: bool) -> tuple[Tensor, Tensor, int, int]:
    """Offsets, the group of each row, rows and columns; the last rows are of no group."""
    sizes = torch.tensor(ALIGNED if machine.count else LONG if fp8 else RAGGED)
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()
    of_row = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    return offsets, of_row, int(offsets[-1]) + (0 if machine.count else 16), 256 if machine.count else 144


def assert_near(got: Tensor, expected: Tensor, rounding: float = 0.0) -> None:
    far = (got.double() - expected).abs() > (2.0**-18 + rounding) * (1 + expected.abs())
    assert not bool(far.any()), f"{int(far.sum())} of {far.numel()} values are beyond their bound"


def adding(machine: Machine, dtype: torch.dtype) -> None:
    offsets, of_row, r, n = groups(machine, False)
    y, bias, weights = torch.randn(r, n).to(dtype), torch.randn(len(offsets) - 1, n).to(dtype), torch.rand(r)
    expected = y.double()
    expected[: len(of_row)] += bias.double()[of_row] * weights.double()[: len(of_row), None]
    with on_machine(machine):
        ops("triton", "expert_bias").add_expert_bias(y, bias, offsets, weights)
    assert_near(y, expected, 2.0**-8 if dtype is torch.bfloat16 else 0.0)


def by_rows(machine: Machine, dtype: torch.dtype, fp8: bool) -> None:
    offsets, of_row, r, n = groups(machine, fp8)
    dy, bias = torch.randn(r, n).to(dtype), torch.randn(len(offsets) - 1, n).to(torch.bfloat16 if fp8 else dtype)
    d_weights = torch.randn(r)
    expected, seen = d_weights.double(), dy
    if fp8:
        rows = ops("reference", "quantize").quantize_rows(dy)
        dy, seen = Fp8Tensor(rows.data, rows.scale.t().contiguous().t()), rows.dequantize()
    expected[: len(of_row)] += (seen.double()[: len(of_row)] * bias.double()[of_row]).sum(1)
    with on_machine(machine):
        ops("triton", "expert_bias").expert_bias_dgrad(dy, bias, offsets, d_weights)
    assert_near(d_weights, expected)


def by_columns(machine: Machine, dtype: torch.dtype, fp8: bool) -> None:
    offsets, of_row, r, n = groups(machine, fp8)
    dy, main_grad = torch.randn(r, n).to(dtype), torch.randn(len(offsets) - 1, n)
    weights = torch.rand(r) if fp8 else None
    before, seen = main_grad.double(), dy.double()
    if fp8:
        columns = ops("reference", "quantize").quantize_columns(dy)
        seen = columns.dequantize().t().double() * weights.double()[:, None]
        dy = Fp8Tensor(columns.data.contiguous(), columns.scale.t().contiguous().t())
    with on_machine(machine):
        ops("triton", "expert_bias").expert_bias_wgrad(dy, offsets, main_grad, weights)
    assert_near(main_grad, before.index_add(0, of_row, seen[: len(of_row)]))


def cases() -> Iterator[Case]:
    """Every op, as the compile table has them."""
    for dtype, kind in DTYPES:
        yield f"triton add_expert_bias {kind}", partial(adding, dtype=dtype)
        yield f"triton expert_bias_dgrad {kind}", partial(by_rows, dtype=dtype, fp8=False)
        yield f"triton expert_bias_wgrad {kind}", partial(by_columns, dtype=dtype, fp8=False)
    yield "triton expert_bias_dgrad fp8", partial(by_rows, dtype=torch.bfloat16, fp8=True)
    yield "triton expert_bias_wgrad fp8", partial(by_columns, dtype=torch.bfloat16, fp8=True)
