"""SwiGLU on the machine, with casts and without: what holds a sigmoid within its bound of FP64, the rest to the bit.

Values reach from subnormal codes to saturation and hold gates beyond the exponential; sizes have short last tiles, and
tiles that hold the end of gate and the start of up.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR, GRADIENT_AMAX_FLOOR
from tests.kernels.activation_bounds import activate, assert_cast, differentiate
from tests.kernels.sm90_fused_cases import ACTIVATIONS, CLAMPED, LIMIT, RECOMPUTED, UNCAST
from tests.ptx.launching import Machine, on_machine
from tests.ptx.moving_cases import Case, assert_equal, ops


def sizes(machine: Machine, f: int, *ragged: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Rows and F: ragged, or where accesses are counted aligned ones, as the compile table has them."""
    return ((128, f),) if machine.count else ragged


def operands(r: int, f: int, dtype: torch.dtype, weighted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """gate_up [R, 2F] with a row of zeros and gates of any size, dy [R, F], weights [R]."""
    gate_up = torch.randn(r, 2 * f) * torch.logspace(-6, 2, r)[torch.randperm(r)][:, None]
    gate_up[1], gate_up[2, :4] = 0, torch.tensor([-3e4, 3e4, -90.0, -1.278])
    dy = torch.randn(r, f) * torch.logspace(-12, 2, r)[torch.randperm(r)][:, None]
    return gate_up.to(dtype), dy.to(dtype), torch.rand(r) * 2 if weighted else None


def forward(machine: Machine, dtype: torch.dtype, f: int, weighted: bool, power_of_two: bool) -> None:
    for shape in sizes(machine, f, (37, 80), (24, 128)):
        gate_up, _, weights = operands(*shape, dtype, weighted)
        with on_machine(machine):
            hidden, cached = ops("triton", "swiglu").swiglu(gate_up, weights, power_of_two=power_of_two)
        assert_equal(cached, ops("reference", "swiglu").swiglu(gate_up, weights, power_of_two=power_of_two)[1])
        assert_cast(hidden, activate(gate_up, weights), ACTIVATION_AMAX_FLOOR, power_of_two)
    if machine.count:
        return
    broken, _, weights = operands(24, f, dtype, weighted)
    broken[4, 5], broken[5, f + 3], broken[6, f - 1] = float("nan"), float("inf"), -float("inf")
    with on_machine(machine):
        got = ops("triton", "swiglu").swiglu(broken, weights, power_of_two=power_of_two)
    expected = ops("reference", "swiglu").swiglu(broken, weights, power_of_two=power_of_two)
    assert_equal(got[1], expected[1])
    assert torch.equal(got[0].scale.isfinite(), expected[0].scale.isfinite()), "another tile is not finite"


def columns(machine: Machine, dtype: torch.dtype, f: int, weighted: bool, limit: float | None = None) -> None:
    for shape in sizes(machine, f, (144, 80), (32, 64)):
        gate_up, _, weights = operands(*shape, dtype, weighted)
        cached = ops("reference", "swiglu").swiglu(gate_up)[1]
        with on_machine(machine):
            found = ops("triton", "swiglu").swiglu_columns(cached, weights, limit=limit)
        assert_cast(found, activate(cached.dequantize(), weights, limit).t(), ACTIVATION_AMAX_FLOOR, True)


def backward(
    machine: Machine, dtype: torch.dtype, f: int, weighted: bool, power_of_two: bool, limit: float | None = None
) -> None:
    for shape in sizes(machine, f, (144, 80), (16, 128)):
        gate_up, dy, weights = operands(*shape, dtype, weighted)
        cached = ops("reference", "swiglu").swiglu(gate_up)[1]
        with on_machine(machine):
            rows, by_columns, d_weights = ops("triton", "swiglu").swiglu_backward(
                dy, cached, weights, limit=limit, power_of_two=power_of_two
            )
        grads, whole = differentiate(cached.dequantize(), dy, weights, limit)
        assert_cast(rows, grads, GRADIENT_AMAX_FLOOR, power_of_two)
        assert_cast(by_columns, grads.t(), GRADIENT_AMAX_FLOOR, power_of_two)
        if weighted:
            whole.assert_contains(d_weights)


def unquantized(machine: Machine, dtype: torch.dtype, f: int, weighted: bool, limit: float | None = None) -> None:
    for shape in sizes(machine, f, (9, 80), (3, 600)):
        gate_up, dy, weights = operands(*shape, dtype, weighted)
        with on_machine(machine):
            product = ops("triton", "silu_mul").silu_mul(gate_up, weights, limit=limit)
            found, d_weights = ops("triton", "silu_mul").silu_mul_backward(dy, gate_up, weights, limit=limit)
        activate(gate_up, weights, limit).assert_contains(product)
        grads, whole = differentiate(gate_up, dy, weights, limit)
        grads.assert_contains(found)
        if weighted:
            whole.assert_contains(d_weights)


def biased_forward(machine: Machine, dtype: torch.dtype, f: int, weighted: bool, power_of_two: bool) -> None:
    """Clamped, with a bias of each expert: one has no rows, and the last rows are of none."""
    for r, wide in sizes(machine, f, (152, 80), (136, 128)):
        gate_up, _, weights = operands(r, wide, dtype, weighted)
        bias, groups = torch.randn(3, 2 * wide).to(dtype), torch.tensor([0, 0, 128, 128], dtype=torch.int32)
        with on_machine(machine):
            hidden, cached = ops("triton", "swiglu").swiglu(
                gate_up, weights, bias, groups, limit=LIMIT, power_of_two=power_of_two
            )
        values = gate_up.float()
        values[:128] += bias[1].float()
        assert_equal(cached, ops("reference", "quantize").quantize_rows(values, power_of_two=power_of_two))
        assert_cast(hidden, activate(values, weights, LIMIT), ACTIVATION_AMAX_FLOOR, power_of_two)


def clamped_cases() -> Iterator[Case]:
    """The clamped kind of every kernel, forward with biases."""
    for label, dtype, f, weighted, power_of_two in CLAMPED:
        kind = {"dtype": dtype, "f": f, "weighted": weighted}
        yield f"triton swiglu {label}", partial(biased_forward, power_of_two=power_of_two, **kind)
        yield f"triton swiglu_backward {label}", partial(backward, power_of_two=power_of_two, limit=LIMIT, **kind)
        yield f"triton swiglu_columns {label}", partial(columns, limit=LIMIT, **kind)
    yield "triton silu_mul clamped bf16", partial(unquantized, limit=LIMIT, **kind)


def cases() -> Iterator[Case]:
    """Every kernel of SwiGLU, as the compile table has them."""
    for label, dtype, f, weighted, power_of_two in ACTIVATIONS:
        kind = {"dtype": dtype, "f": f, "weighted": weighted}
        yield f"triton swiglu {label}", partial(forward, power_of_two=power_of_two, **kind)
        yield f"triton swiglu_backward {label}", partial(backward, power_of_two=power_of_two, **kind)
        if label in RECOMPUTED:
            yield f"triton swiglu_columns {label}", partial(columns, **kind)
        if label in UNCAST:
            yield f"triton silu_mul {label}", partial(unquantized, **kind)
    yield from clamped_cases()
