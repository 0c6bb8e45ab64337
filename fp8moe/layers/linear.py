"""Linears without bias whose three products follow the recipe, the embedding, and the FP32 gradients of all parameters.

    Fprop  y  [T, N] = x  [T, K] @ W^T          rows of x, 128x128 blocks of W
    Dgrad  dx [T, K] = dy [T, N] @ W            rows of dy, blocks of the transposed copy
    Wgrad  dW [N, K] += dy^T @ x                columns of dy and of x, into FP32 `main_grad`

FP8 WGMMA reads K-major operands only, so the weight is kept quantized twice, as it is and transposed: made by
`quantize_weights` when weights were set, by `load_state_dict`, and overwritten by each update of the optimizer. In BF16
and FP32 the same three names are plain products.

Every parameter gets `main_grad`, a view of a flat FP32 buffer in the order of `model.parameters()`, so that one
collective reduces many parameters and zeroing is one call; it outlives a micro-batch. Linears, norms, the router's gate
and the embedding add into it themselves; a parameter whose gradient autograd computes has a hook that moves `.grad`
over. `.grad` is always None between steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fp8moe.kernels.embedding import embedding_wgrad
from fp8moe.kernels.fp8 import BLOCK_TILE, Fp8Tensor, ceil_div
from fp8moe.kernels.gemm import gemm, wgrad
from fp8moe.kernels.quantize import quantize_blocks
from fp8moe.layers.operand import Activation, Rows, activation, from_gradient
from fp8moe.layers.phase import submit
from fp8moe.layers.recipe import Recipe
from fp8moe.layers.recompute import Recallable

_NOT_QUANTIZED = "quantize_weights(model) must run after weights are set and before a forward"


class QuantizedWeight(nn.Module):
    """A weight [..., N, K] with, in FP8, its quantized blocks and those of its transposed copy.

    matrix_rows: rows of each of the matrices that were joined to one weight (gate and up: two); None where it is a
    single one, () for the output head. See `matrices`.
    """

    weight: nn.Parameter

    def __init__(self, shape: tuple[int, ...], recipe: Recipe, matrix_rows: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.recipe = recipe
        self.weight = nn.Parameter(torch.empty(shape, dtype=recipe.dtype))
        self.weight.matrix_rows = shape[-2:-1] if matrix_rows is None else matrix_rows  # type: ignore[attr-defined]
        self._blocks: tuple[Fp8Tensor, Fp8Tensor] | None = None
        self.blocks_lie_still = False  # new blocks are copied to where the old ones are: a CUDA graph reads them there
        self.register_load_state_dict_post_hook(_quantize_loaded)

    def quantize(self) -> None:
        """Refresh the FP8 blocks from the weight; nothing to do in BF16 and FP32."""
        if not self.recipe.fp8:
            return
        blocks = quantize_blocks(self.weight.detach(), power_of_two=self.recipe.power_of_two(False))
        if self._blocks is None or not self.blocks_lie_still:
            self._blocks = blocks
            return
        for there, made in zip(self._blocks, blocks, strict=True):
            there.data.copy_(made.data)
            there.scale.copy_(made.scale)

    @property
    def blocks(self) -> Fp8Tensor:
        """The weight, for Fprop."""
        assert self._blocks is not None, _NOT_QUANTIZED
        return self._blocks[0]

    @property
    def transposed_blocks(self) -> Fp8Tensor:
        """The transposed weight, for Dgrad."""
        assert self._blocks is not None, _NOT_QUANTIZED
        return self._blocks[1]


def _quantize_loaded(module: nn.Module, _: object) -> None:
    """After `load_state_dict`, however deep in the loaded model: blocks of the weight before would be multiplied."""
    assert isinstance(module, QuantizedWeight)
    if not module.weight.is_meta:
        module.quantize()


class Linear(QuantizedWeight):
    """y = x W^T with x [T, in_features] -> y [T, out_features]; `weight` [out_features, in_features]."""

    defers_wgrad = True

    def __init__(
        self, in_features: int, out_features: int, recipe: Recipe, *, matrix_rows: tuple[int, ...] | None = None
    ) -> None:
        super().__init__((out_features, in_features), recipe, matrix_rows)

    def forward(self, x: Tensor | Recallable | Activation) -> Tensor:
        """x: a tensor, cast here, or an activation that was cast before (one cast can feed several Linears)."""
        if not isinstance(x, Activation):
            x = activation(x, self.recipe, power_of_two=self.recipe.power_of_two(False))
        return _LinearFunction.apply(x.autograd_handle, entry(x.autograd_handle, self), x, self)

    def fprop(self, x: Rows) -> Tensor:
        return gemm(x, self.blocks) if isinstance(x, Fp8Tensor) else product(x, self.weight.detach().T)

    def dgrad(self, dy: Rows) -> Tensor:
        return gemm(dy, self.transposed_blocks) if isinstance(dy, Fp8Tensor) else product(dy, self.weight.detach())

    def wgrad(self, dy_columns: Rows, x_columns: Rows) -> None:
        add_wgrad(main_grad_of(self.weight), dy_columns, x_columns)


class LinearPart:
    """Some outputs of a Linear: its three products on `rows` of the weight, in FP8 from and to multiples of 128.

    at_once: the weight gradient is not put off, where what it would keep is large.
    """

    def __init__(self, linear: Linear, rows: slice, *, at_once: bool = False) -> None:
        self.linear, self.rows, self.defers_wgrad = linear, rows, not at_once
        self.recipe = linear.recipe

    def __call__(self, x: Activation) -> Tensor:
        """[T, in_features] -> [T, rows]."""
        return _LinearFunction.apply(x.autograd_handle, entry(x.autograd_handle, self.linear), x, self)

    def fprop(self, x: Rows) -> Tensor:
        if not isinstance(x, Fp8Tensor):
            return product(x, self.linear.weight.detach()[self.rows].T)
        blocks, (tile, _) = self.linear.blocks, BLOCK_TILE
        rows = slice(self.rows.start // tile, ceil_div(self.rows.stop, tile))
        return gemm(x, Fp8Tensor(blocks.data[self.rows], blocks.scale[rows], BLOCK_TILE))

    def dgrad(self, dy: Rows) -> Tensor:
        if not isinstance(dy, Fp8Tensor):
            return product(dy, self.linear.weight.detach()[self.rows])
        blocks, (tile, _) = self.linear.transposed_blocks, BLOCK_TILE
        rows = slice(self.rows.start // tile, ceil_div(self.rows.stop, tile))
        data, scale = blocks.data[:, self.rows].contiguous(), blocks.scale[:, rows].contiguous()
        return gemm(dy, Fp8Tensor(data, scale, BLOCK_TILE))

    def wgrad(self, dy_columns: Rows, x_columns: Rows) -> None:
        add_wgrad(main_grad_of(self.linear.weight)[self.rows], dy_columns, x_columns)


def add_wgrad(main_grad: Tensor, dy_columns: Rows, x_columns: Rows) -> None:
    """main_grad [N, K] (FP32) += dy^T x of columns of both."""
    if isinstance(dy_columns, Fp8Tensor) and isinstance(x_columns, Fp8Tensor):
        gemm(dy_columns, x_columns, out_dtype=torch.float32, accumulate=main_grad)
    else:
        assert isinstance(dy_columns, Tensor) and isinstance(x_columns, Tensor)
        wgrad(dy_columns, x_columns, main_grad)


# Elsewhere PyTorch multiplies BF16 matrices on a CPU in a plain loop, twenty times slower than FP32 ones.
_CPU_MULTIPLIES_BF16 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether BF16 products are as fast there as they should be; where not, their operands are widened to FP32."""
    return device.type != "cpu" or _CPU_MULTIPLIES_BF16


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N] of one dtype, unquantized: FP32 sums, rounded once to that dtype, on any device."""
    if a.dtype is torch.bfloat16 and not multiplies_bf16(a.device):
        return (a.float() @ b.float()).to(a.dtype)
    return a @ b


def entry(autograd_handle: Tensor, module: nn.Module) -> Tensor | None:
    """The weight where autograd would not enter a function without it, because the input needs no gradient.

    Elsewhere it is none of the function's arguments: autograd would visit it in the backward, with nothing to add.
    """
    weight: Tensor | None = None if autograd_handle.requires_grad else module.weight  # type: ignore[assignment]
    return weight


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, autograd_handle: Tensor, weight: Tensor | None, x: Activation, linear: Linear | LinearPart
    ) -> Tensor:
        ctx.columns, ctx.linear = x.operand.columns, linear
        return linear.fprop(x.operand.rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        linear, x_columns = ctx.linear, ctx.columns
        dy = from_gradient(grads[0], linear.recipe)
        dy_columns = dy.columns
        if linear.defers_wgrad:
            submit(lambda: linear.wgrad(dy_columns(), x_columns()))
        else:
            linear.wgrad(dy_columns(), x_columns())
        return linear.dgrad(dy.rows) if ctx.needs_input_grad[0] else None, None, None, None


def quantize_weights(model: nn.Module) -> None:
    """Refresh every FP8 weight of `model` after weights were set; the optimizer's updates do it by themselves."""
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            module.quantize()


class Embedding(nn.Module):
    """ids [T] int64 -> [T, dim]; `weight` [vocab_size, dim].

    Its gradient goes into FP32 `main_grad` directly, in the order of the tokens: a frequent token sums thousands of
    rows, which BF16 would lose.
    """

    def __init__(self, vocab_size: int, dim: int, recipe: Recipe) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim, dtype=recipe.dtype))

    def forward(self, ids_T: Tensor) -> Tensor:
        return _EmbeddingFunction.apply(self.weight, ids_T)


class _EmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids_T: Tensor) -> Tensor:
        ctx.weight, ctx.ids_T = weight, ids_T
        return weight.detach()[ids_T]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        weight, ids_T, dy_TD = ctx.weight, ctx.ids_T, grads[0]
        submit(lambda: embedding_wgrad(dy_TD, ids_T, weight.main_grad))
        return None, None


@dataclass(frozen=True)
class MainGrads:
    """The flat FP32 buffers: `dense` is reduced over all data-parallel ranks, `expert` over those with its experts."""

    dense: torch.Tensor
    expert: torch.Tensor

    def zero_(self) -> None:
        self.dense.zero_()
        self.expert.zero_()


def is_expert(parameter: Parameter) -> bool:
    """Whether this rank holds only its own share of the parameter's experts (dimension 0)."""
    return getattr(parameter, "is_expert", False)


def decays(parameter: Parameter) -> bool:
    """Whether weight decay shrinks it: a matrix, or the matrices of experts; not norms' gains and biases."""
    return parameter.ndim - is_expert(parameter) >= 2


def main_grad_of(parameter: Parameter) -> Tensor:
    """The FP32 gradient that `attach_main_grads` gave a parameter, in its shape."""
    main_grad: Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return main_grad


class Matrix(NamedTuple):
    """A matrix [n, k] within a flat buffer: its values are [start, stop), row by row."""

    start: int
    stop: int
    n: int
    k: int

    def shifted(self, by: int) -> Matrix:
        """The same matrix in a buffer in which it starts `by` values later."""
        return self._replace(start=self.start + by, stop=self.stop + by)


def matrices(parameter: Tensor) -> list[Matrix]:
    """The matrices that `parameter` [..., N, K] is made of, in flat values of it, ascending and without gaps.

    Each expert has its own, and each of the Linears whose weights were joined to one (gate and up, both down
    projections of attention); heads of attention are not apart. They are what Muon orthogonalizes, so a shard must hold
    whole ones. [] for what is not the matrix of a hidden layer: embedding, output head, norms and the router's gate.
    Layers say so by `matrix_rows` of their weight, the rows of each matrix. Raises ValueError where these are not all.
    """
    rows: tuple[int, ...] = getattr(parameter, "matrix_rows", ())
    if not rows:
        return []
    *leading, n, k = parameter.shape
    if sum(rows) != n:
        raise ValueError(f"matrix_rows={rows} have {sum(rows)} rows and the weight {list(parameter.shape)} has {n}")
    found: list[Matrix] = []
    for height in rows * math.prod(leading):
        start = found[-1].stop if found else 0
        found.append(Matrix(start, start + height * k, height, k))
    return found


def _move_grad(parameter: torch.Tensor) -> None:
    if parameter.grad is None:  # a Linear's weight, which autograd follows but which adds its gradient itself
        return
    parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
    parameter.grad = None


def attach_main_grads(model: nn.Module) -> MainGrads:
    """Give every parameter its zeroed `main_grad` (its shape and device, FP32) and return the buffers behind them."""
    flats = []
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for expert in (False, True):
        parameters = [p for p in model.parameters() if is_expert(p) is expert]
        flat = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float32, device=device)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.main_grad = part.view(parameter.shape)  # type: ignore[attr-defined]
            parameter.register_post_accumulate_grad_hook(_move_grad)
        flats.append(flat)
    return MainGrads(*flats)
