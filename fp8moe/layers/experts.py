"""The routed experts that this rank holds: their MLPs on received rows, grouped by expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp8moe.layers.dispatch import Received
from fp8moe.layers.grouped_linear import GroupedLinear
from fp8moe.layers.mlp import gated_mlp
from fp8moe.layers.precision import Precision
from fp8moe.layers.recompute import DEFAULT, Recompute
from fp8moe.layers.swiglu import swiglu


class Experts(nn.Module):
    """`gate_up.weight` [e, 2F, D] and `down.weight` [e, D, F] of e local experts, stacked."""

    def __init__(
        self,
        num_local_experts: int,
        dim: int,
        hidden: int,
        *,
        precision: Precision,
        recompute: frozenset[Recompute] = DEFAULT,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.precision = precision
        self.act = swiglu(precision, recompute=recompute)
        self.gate_up = GroupedLinear(num_local_experts, dim, 2 * hidden, precision=precision, device=device)
        self.down = GroupedLinear(num_local_experts, hidden, dim, precision=precision, device=device)

    def forward(self, received: Received) -> Tensor:
        """-> y [R, D], each row already multiplied by its routing weight; the gradient may return in FP8."""
        return gated_mlp(
            received.x,
            self.gate_up.at(received.group_offsets),
            self.down.at(received.group_offsets),
            precision=self.precision,
            act=self.act,
            parameters=(self.gate_up.weight, self.down.weight),
            weights_R=received.weights_R,
            gradient=received.gradient,
        )
