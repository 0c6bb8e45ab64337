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

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

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


class ReadyCast(NamedTuple):
    """The FP8 forms of a tensor, made by the kernel that made the tensor: rows now, the others when backward asks.

    rows: for Fprop. columns(): for Wgrad. rows_again(): for an Fprop that backward repeats. They equal the casts of the
    tensor bit for bit, and none of them needs it.
    """

    rows: Fp8Tensor
    columns: Callable[[], Fp8Tensor]
    rows_again: Callable[[], Fp8Tensor]
    power_of_two: bool


@dataclass(frozen=True)
class Normed(Recallable):
    """What a norm gives, y [T, D], in each form that its consumers read; `activation` and `recast` take what is ready.

    tensor     y, followed by autograd: for the router, the head, and every Linear in BF16 and FP32. Where the norm was
               built for FP8 Linears alone it is a placeholder, which carries their gradient back and no values
    recall()   y for the backward: kept, or normed again
    cast       y in FP8, cast by the norm's kernel; None in BF16 and FP32, or where no FP8 Linear reads y
    """

    cast: ReadyCast | None = None


class Operand(NamedTuple):
    """One operand [T, N] of a Linear: `rows` for Fprop or Dgrad, `columns()` for Wgrad."""

    rows: Rows
    columns: Callable[[], Rows]


class Activation(NamedTuple):
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
    """One NaN seen as a tensor of `shape`, with the dtype and device of `like`; it takes no memory and no launch."""
    return _nan(like).expand(shape)


def _nan(like: Tensor) -> Tensor:
    if type(like) is not Tensor:  # without data, or followed by a tracer: such a NaN can't outlive the call
        return like.new_full((), math.nan)
    return _nan_on(like.dtype, like.device)


@functools.cache
@torch.inference_mode(False)
def _nan_on(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), math.nan, dtype=dtype, device=device)


def cast(x: Tensor, recipe: Recipe, *, power_of_two: bool = False) -> Rows:
    """The rows of an activation x [T, D]: in BF16 and FP32 x itself."""
    return quantize_rows(x, power_of_two=power_of_two) if recipe.fp8 else x.detach()


def from_tensor(x: Tensor | Recallable, recipe: Recipe, *, power_of_two: bool = False) -> Operand:
    """Cast an activation x [T, D] at its use, unless its norm has; for the columns it is recalled."""
    x = kept(x)
    ready = ready_cast(x, recipe)
    if ready is not None:
        assert ready.power_of_two == power_of_two, (
            f"the norm cast its output with power_of_two={ready.power_of_two}, its consumer wants {power_of_two}: "
            "build the norm with the `feeds` of that consumer"
        )
        return Operand(ready.rows, ready.columns)
    recall, rows = x.recall, cast(x.tensor.detach(), recipe, power_of_two=power_of_two)
    if not recipe.fp8:
        return Operand(rows, recall)
    return Operand(rows, lambda: quantize_columns(recall(), power_of_two=power_of_two))


def recast(x: Tensor | Recallable, recipe: Recipe) -> Callable[[], Rows]:
    """The rows of x [T, D] once more, for an Fprop that backward repeats; holds on to nothing but what makes them."""
    x = kept(x)
    ready = ready_cast(x, recipe)
    if ready is not None:
        return ready.rows_again
    recall = x.recall
    return lambda: cast(recall(), recipe, power_of_two=recipe.power_of_two(False))


def ready_cast(x: Recallable, recipe: Recipe) -> ReadyCast | None:
    """The FP8 forms that x brings along, if it does and `recipe` multiplies in FP8."""
    return x.cast if recipe.fp8 and isinstance(x, Normed) else None


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


def revealed(handle: Tensor, values: Tensor) -> Tensor:
    """The inverse of `detached_handle`: the values, whose gradient goes to the placeholder."""
    return _RevealFunction.apply(handle, values)


class _RevealFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handle: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
