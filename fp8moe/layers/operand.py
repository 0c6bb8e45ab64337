"""What the three products of a Linear consume, in every precision.

Fprop and Dgrad contract over features and want *rows* (1x128 scales along features); Wgrad contracts over tokens and
wants *columns* (the transposed tensor, 1x128 scales along tokens). An `Operand` is both: rows at hand, columns made
when the weight gradient is computed, from whatever the recipe keeps for them. In BF16 and FP32 both are the tensor.
A backward must hold on to `columns` alone, since rows are done with after Fprop.

Autograd moves plain tensors only, and wants a gradient in the dtype of its value. Where FP8 travels, forward or back,
a stand-in travels in its place: a view of one NaN, without memory, of the right shape and dtype. Should anyone compute
with a stand-in, the result is NaN and no step is taken; that is its purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR, GRADIENT_AMAX_FLOOR, Fp8Tensor
from fp8moe.kernels.quantize import (
    quantize_columns,
    quantize_rows,
    quantize_rows_and_columns,
    requantize_columns,
)
from fp8moe.layers.precision import Precision
from fp8moe.layers.recompute import Recallable, kept

Rows = Tensor | Fp8Tensor


@dataclass(frozen=True)
class Operand:
    """One operand [T, N] of a Linear: `rows` for Fprop or Dgrad, `columns()` for Wgrad."""

    rows: Rows
    columns: Callable[[], Rows]


@dataclass(frozen=True)
class Activation:
    """An `Operand` on the tape: autograd follows `edge` [T, D], which is the tensor itself or its stand-in."""

    edge: Tensor
    operand: Operand


class Fp8Gradient:
    """A letter box: the gradient of a value, delivered in FP8 beside autograd's stand-in, and taken out once."""

    def __init__(self) -> None:
        self._rows: Fp8Tensor | None = None

    def put(self, rows: Fp8Tensor) -> None:
        assert self._rows is None, "the last gradient was never taken"
        self._rows = rows

    def take(self) -> Fp8Tensor | None:
        rows, self._rows = self._rows, None
        return rows


def stand_in(shape: torch.Size | tuple[int, ...], like: Tensor) -> Tensor:
    """One NaN seen as a tensor of `shape`, with the dtype and device of `like`."""
    return like.new_full((), float("nan")).expand(shape)


def cast(x: Tensor, precision: Precision, *, power_of_two: bool = False) -> Rows:
    """The rows of an activation x [T, D]: in BF16 and FP32 x itself."""
    return quantize_rows(x, power_of_two=power_of_two) if precision is Precision.FP8 else x.detach()


def from_tensor(x: Tensor | Recallable, precision: Precision, *, power_of_two: bool = False) -> Operand:
    """Cast an activation x [T, D] at its use; for the columns it is recalled."""
    x = kept(x)
    recall, rows = x.recall, cast(x.tensor.detach(), precision, power_of_two=power_of_two)
    if precision is not Precision.FP8:
        return Operand(rows, recall)
    return Operand(rows, lambda: quantize_columns(recall(), power_of_two=power_of_two))


def from_rows(rows: Rows, *, amax_floor: float = ACTIVATION_AMAX_FLOOR) -> Operand:
    """An operand that arrived as rows: in FP8 its columns are requantized with power-of-two scales, almost exactly."""
    if not isinstance(rows, Fp8Tensor):
        return Operand(rows, lambda: rows)
    return Operand(rows, lambda: requantize_columns(rows, amax_floor=amax_floor))


def from_gradient(dy: Tensor, precision: Precision) -> Operand:
    """Cast a gradient dy [T, N] for Dgrad and Wgrad in one pass; its scales may go down to 1e-30 / 448."""
    if precision is not Precision.FP8:
        return Operand(dy, lambda: dy)
    rows, columns = quantize_rows_and_columns(dy, amax_floor=GRADIENT_AMAX_FLOOR)
    return Operand(rows, lambda: columns)


def activation(x: Tensor | Recallable, precision: Precision, *, power_of_two: bool = False) -> Activation:
    """Put an operand made of x [T, D] on the tape; in FP8 the cast is transparent to gradients (straight through)."""
    return Activation(kept(x).tensor, from_tensor(x, precision, power_of_two=power_of_two))


def edge_of(x: Tensor) -> Tensor:
    """The place of x [T, D] on the tape without its values: a stand-in, whose gradient is x's."""
    return _EdgeFunction.apply(x)


class _EdgeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return stand_in(x.shape, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]
