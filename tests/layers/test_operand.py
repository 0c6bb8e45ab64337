"""Operands, placeholders and the slot of an FP8 gradient: right uses, and misuses that stop the step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR, GRADIENT_AMAX_FLOOR, Fp8Tensor
from fp8moe.kernels.quantize import quantize_columns, quantize_rows
from fp8moe.layers.operand import (
    Fp8Gradient,
    Rows,
    activation,
    detached_handle,
    from_gradient,
    from_rows,
    from_tensor,
    placeholder,
)
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.layers.recompute import Recallable

T, D = 48, 64
FP8 = Recipe(Precision.FP8)


def same(a: Rows, b: Rows) -> bool:
    assert isinstance(a, Fp8Tensor) and isinstance(b, Fp8Tensor)
    return torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8)) and torch.equal(a.scale, b.scale)


def test_a_detached_handle_passes_gradients_and_no_values() -> None:
    x, dy = torch.randn(2, T, D)
    x.requires_grad_()
    detached_handle(x).backward(dy)
    assert x.grad is not None and torch.equal(x.grad, dy)


def test_a_placeholder_makes_nan_of_what_is_computed_with_it() -> None:
    like = torch.zeros(1, dtype=torch.bfloat16)
    handle = placeholder((3, 4), like)
    assert handle.untyped_storage().nbytes() == 2 and handle.dtype is torch.bfloat16 and handle.shape == (3, 4)
    assert (handle + 1).isnan().all() and (handle @ torch.zeros(4, 2).bfloat16()).isnan().all()
    x = torch.randn(T, D, requires_grad=True)
    (detached_handle(x) * 2).backward(placeholder((T, D), x))
    assert x.grad is not None and x.grad.isnan().all(), "and so is the gradient where it was not replaced"


def test_the_slot_gives_each_gradient_once_and_holds_one() -> None:
    slot, rows = Fp8Gradient(), quantize_rows(torch.randn(16, 16))
    assert slot.take() is None
    slot.put(rows)
    with pytest.raises(AssertionError, match="never taken"):
        slot.put(rows)
    assert slot.take() is rows and slot.take() is None
    slot.put(rows)
    assert slot.take() is rows


@pytest.mark.parametrize("power_of_two", [False, True])
def test_an_activation_is_cast_in_rows_now_and_in_columns_when_recalled(power_of_two: bool) -> None:
    x, recalled = torch.randn(2, T, D).bfloat16()
    calls: list[int] = []

    def recall() -> Tensor:
        calls.append(1)
        return recalled

    made = activation(Recallable(x, recall), FP8, power_of_two=power_of_two)
    assert made.autograd_handle is x and not calls
    assert same(made.operand.rows, quantize_rows(x, power_of_two=power_of_two))
    assert same(made.operand.columns(), quantize_columns(recalled, power_of_two=power_of_two)) and len(calls) == 1


def test_without_fp8_operands_are_the_tensors() -> None:
    recipe, x = Recipe(Precision.BF16), torch.randn(T, D).bfloat16().requires_grad_()
    other = torch.zeros(T, D).bfloat16()
    operand = from_tensor(Recallable(x, lambda: other), recipe)
    assert isinstance(operand.rows, Tensor) and operand.rows.data_ptr() == x.data_ptr()
    assert not operand.rows.requires_grad and operand.columns() is other
    for operand in (from_gradient(x.detach(), recipe), from_rows(x.detach())):
        assert isinstance(operand.rows, Tensor) and operand.columns() is operand.rows


def test_small_gradients_survive_their_cast_and_activations_are_cut_off() -> None:
    """Floors of the largest value of a tile: 1e-30 for gradients, 1e-4 for activations."""
    dy = torch.randn(T, D) * 1e-20
    gradient = from_gradient(dy, FP8)
    for rows, exact in ((gradient.rows, dy), (gradient.columns(), dy.T)):
        assert isinstance(rows, Fp8Tensor)
        assert (rows.dequantize() - exact).norm() < 0.05 * exact.norm()
    arrived = quantize_rows(dy, amax_floor=GRADIENT_AMAX_FLOOR, power_of_two=True)
    columns = from_rows(arrived, amax_floor=GRADIENT_AMAX_FLOOR).columns()
    lost = from_rows(arrived).columns()
    assert isinstance(columns, Fp8Tensor) and isinstance(lost, Fp8Tensor)
    assert (columns.dequantize() - dy.T).norm() < 0.05 * dy.norm()
    assert not lost.dequantize().any() and lost.scale.min() >= ACTIVATION_AMAX_FLOOR / 448
