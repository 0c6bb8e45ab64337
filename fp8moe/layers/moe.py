"""A mixture of experts: route, announce, dispatch, experts, combine; the shared experts beside them.

Parallelism is the dispatcher's business alone. The steps are separate methods, so that a block can run them as
phases; `forward` runs them in order.

Legend: T tokens, D model, R received rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp8moe.layers.dispatch import Dispatcher, Received, combined, dispatched
from fp8moe.layers.experts import Experts
from fp8moe.layers.mlp import Mlp
from fp8moe.layers.operand import Activation, activation
from fp8moe.layers.precision import Precision
from fp8moe.layers.recompute import DEFAULT, Recallable, Recompute, kept
from fp8moe.layers.router import Router, RouterConfig, Routing


class MoE(nn.Module):
    """x [T, D] -> [T, D]; `hidden` features an expert, `num_shared_experts` of them seen by every token."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        router: RouterConfig,
        *,
        num_shared_experts: int,
        dispatcher: Dispatcher,
        precision: Precision,
        recompute: frozenset[Recompute] = DEFAULT,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.precision, self.dispatcher = precision, dispatcher
        self.router = Router(dim, router, precision=precision, device=device)
        num_local = dispatcher.num_local_experts
        self.experts = Experts(num_local, dim, hidden, precision=precision, recompute=recompute, device=device)
        self.shared: Mlp | None = None
        if num_shared_experts:
            features = num_shared_experts * hidden
            self.shared = Mlp(dim, features, precision=precision, recompute=recompute, device=device)

    def cast(self, x_TD: Tensor | Recallable) -> Activation:
        """The one cast that dispatch and the shared experts share; its scales are powers of two."""
        return activation(x_TD, self.precision, power_of_two=True)

    def forward(self, x_TD: Tensor | Recallable, num_sequences: int) -> tuple[Tensor, Routing]:
        """-> the sum of shared and routed experts, and the routing."""
        x_TD = kept(x_TD)
        routing = self.router(x_TD, num_sequences)
        announced = self.dispatcher.announce(routing.topk_ids_TK)
        x = self.cast(x_TD)
        received = dispatched(self.dispatcher, x, announced, routing.topk_weights_TK)
        y_RD, shared_TD = self.run_experts(received, x)
        routed_TD = combined(self.dispatcher, y_RD, received)
        return (routed_TD if shared_TD is None else shared_TD + routed_TD), routing

    def run_experts(self, received: Received, x: Activation) -> tuple[Tensor, Tensor | None]:
        """The compute between the two messages: y [R, D] of the routed experts, [T, D] of the shared ones."""
        shared_TD = None if self.shared is None else self.shared(x)
        return self.experts(received), shared_TD
