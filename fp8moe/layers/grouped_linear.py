"""The Linears of all local experts, one launch each: rows of expert e lie in [offsets[e], offsets[e + 1]).

The same three products as `linear.Linear`, with a leading expert dimension; groups are 128-aligned, so that a tile of
columns never holds tokens of two experts. An expert without tokens costs nothing and its `main_grad` is not touched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.grouped_gemm import grouped_gemm
from fp8moe.kernels.grouped_mm import grouped_mm, grouped_mm_wgrad
from fp8moe.kernels.grouped_wgrad import grouped_wgrad
from fp8moe.layers.linear import QuantizedWeight
from fp8moe.layers.operand import Rows
from fp8moe.layers.precision import Precision


class GroupedLinear(QuantizedWeight):
    """`weight` [e, out_features, in_features] of the e experts this rank holds."""

    def __init__(
        self,
        num_local_experts: int,
        in_features: int,
        out_features: int,
        *,
        precision: Precision,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__((num_local_experts, out_features, in_features), precision=precision, device=device)
        self.weight.is_expert = True  # type: ignore[attr-defined]

    def at(self, group_offsets: Tensor) -> GroupedProducts:
        """The three products on rows grouped by `group_offsets` (int32 [e + 1])."""
        return GroupedProducts(self, group_offsets)


@dataclass(frozen=True)
class GroupedProducts:
    """Fprop, Dgrad and Wgrad of a `GroupedLinear` on one set of groups: what `Linear` has, for received rows."""

    linear: GroupedLinear
    group_offsets: Tensor

    def fprop(self, x: Rows) -> Tensor:
        if isinstance(x, Fp8Tensor):
            return grouped_gemm(x, self.linear.blocks, self.group_offsets)
        return grouped_mm(x, self.linear.weight.detach(), self.group_offsets)

    def dgrad(self, dy: Rows) -> Tensor:
        if isinstance(dy, Fp8Tensor):
            return grouped_gemm(dy, self.linear.transposed_blocks, self.group_offsets)
        return grouped_mm(dy, self.linear.weight.detach().mT, self.group_offsets)

    def wgrad(self, dy_columns: Rows, x_columns: Rows) -> None:
        main_grad: Tensor = self.linear.weight.main_grad  # type: ignore[attr-defined]
        if isinstance(dy_columns, Fp8Tensor) and isinstance(x_columns, Fp8Tensor):
            grouped_wgrad(dy_columns, x_columns, self.group_offsets, main_grad)
        else:
            assert isinstance(dy_columns, Tensor) and isinstance(x_columns, Tensor)
            grouped_mm_wgrad(dy_columns, x_columns, self.group_offsets, main_grad)
