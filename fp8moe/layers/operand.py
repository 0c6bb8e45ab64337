"""Operands of a Linear's three products, in every precision.

Fprop and Dgrad contract over features and want *rows* (1x128 scales along features); Wgrad contracts over tokens and
wants *columns* (the transposed tensor, 1x128 scales along tokens). An `Operand` is both: rows at hand, columns made
when the weight gradient is computed, from whatever the recipe keeps for them. In BF16 and FP32 both are the tensor.
A backward must hold on to `columns` alone, since rows are done with after Fprop.

Autograd moves plain tensors only, and wants a gradient in the dtype of its value. Where FP8 travels, forward or back,
a placeholder travels in its place: a view of one NaN, without memory, of the right shape and dtype. Anything computed
from a placeholder is NaN, so that a mistake stops the step instead of training on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR, GRADIENT_AMAX_FLOOR, Fp8Tensor, Rows
from fp8moe.kernels.quantize import (
    quantize_columns,
    quantize_rows,
    quantize_rows_and_columns,
    requantize_columns,
)
from fp8moe.layers.recipe import Recipe
from fp8moe.layers.recompute import Recallable, kept


@dataclass(frozen=True)
class Operand:
    """One operand [T, N] of a Linear: `rows` for Fprop or Dgrad, `columns()` for Wgrad."""

    rows: Rows
    columns: Callable[[], Rows]


@dataclass(frozen=True)
class Activation:
    """An `Operand` that autograd follows by `autograd_handle` [T, D]: the tensor itself, or a placeholder of it."""

    autograd_handle: Tensor
    operand: Operand


class Fp8Gradient:
    """Slot for one FP8 gradient, delivered beside the placeholder that autograd moves, and taken out once."""

    def __init__(self) -> None:
        self._rows: Fp8Tensor | None = None

    def put(self, rows: Fp8Tensor) -> None:
        assert self._rows is None, "the last gradient was never taken"
        self._rows = rows

    def take(self) -> Fp8Tensor | None:
        rows, self._rows = self._rows, None
        return rows


def placeholder(shape: torch.Size | tuple[int, ...], like: Tensor) -> Tensor:
    """One NaN seen as a tensor of `shape`, with the dtype and device of `like`; it takes no memory."""
    return like.new_full((), float("nan")).expand(shape)


def cast(x: Tensor, recipe: Recipe, *, power_of_two: bool = False) -> Rows:
    """The rows of an activation x [T, D]: in BF16 and FP32 x itself."""
    return quantize_rows(x, power_of_two=power_of_two) if recipe.fp8 else x.detach()


def from_tensor(x: Tensor | Recallable, recipe: Recipe, *, power_of_two: bool = False) -> Operand:
    """Cast an activation x [T, D] at its use; for the columns it is recalled."""
    x = kept(x)
    recall, rows = x.recall, cast(x.tensor.detach(), recipe, power_of_two=power_of_two)
    if not recipe.fp8:
        return Operand(rows, recall)
    return Operand(rows, lambda: quantize_columns(recall(), power_of_two=power_of_two))


def from_rows(rows: Rows, *, amax_floor: float = ACTIVATION_AMAX_FLOOR) -> Operand:
    """An operand that arrived as rows: in FP8 its columns are requantized with power-of-two scales, almost exactly."""
    if not isinstance(rows, Fp8Tensor):
        return Operand(rows, lambda: rows)
    return Operand(rows, lambda: requantize_columns(rows, amax_floor=amax_floor))


def from_gradient(dy: Tensor, recipe: Recipe) -> Operand:
    """Cast a gradient dy [T, N] for Dgrad and Wgrad in one pass; its scales may go down to 1e-30 / 448."""
    if not recipe.fp8:
        return Operand(dy, lambda: dy)
    rows, columns = quantize_rows_and_columns(
        dy, amax_floor=GRADIENT_AMAX_FLOOR, power_of_two=recipe.power_of_two(False)
    )
    return Operand(rows, lambda: columns)


def activation(x: Tensor | Recallable, recipe: Recipe, *, power_of_two: bool = False) -> Activation:
    """An operand made of x [T, D], followed by autograd; gradients pass the FP8 cast unchanged (straight through)."""
    return Activation(kept(x).tensor, from_tensor(x, recipe, power_of_two=power_of_two))


def detached_handle(x: Tensor) -> Tensor:
    """A placeholder of x [T, D] whose gradient is x's: autograd follows it, the values of x can be released."""
    return _HandleFunction.apply(x)


class _HandleFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return placeholder(x.shape, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]
