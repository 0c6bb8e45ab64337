"""A mixture of experts: route, announce, cast; dispatch; experts; combine; the shared experts beside them.

Parallelism is the dispatcher's business alone. `route` and `compute` are the two stretches of compute around the
messages; a block's phases (`model.phases`) call them with messages in between that a schedule may hide, `forward` calls
them under ordinary autograd and waits for each message.

Legend: T tokens, D model, K top-k, R received rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fp8moe.layers.dispatch import Announced, Dispatcher, Received, combined, dispatched
from fp8moe.layers.experts import Experts, ExpertsConfig
from fp8moe.layers.mlp import Mlp
from fp8moe.layers.operand import Activation, activation
from fp8moe.layers.recipe import Recipe
from fp8moe.layers.recompute import Recallable, kept
from fp8moe.layers.router import Router, RouterConfig


@dataclass(frozen=True)
class Routed:
    """Tokens ready to be dispatched: cast activations, the announcement of their experts, and their routing weights."""

    x: Activation
    announced: Announced
    topk_weights_TK: Tensor
    balance_loss: Tensor


class MoE(nn.Module):
    """x [T, D] -> [T, D]: the sum of the routed experts that the router chooses and of the shared experts."""

    def __init__(
        self, dim: int, router: RouterConfig, experts: ExpertsConfig, recipe: Recipe, dispatcher: Dispatcher
    ) -> None:
        super().__init__()
        self.recipe, self.dispatcher = recipe, dispatcher
        self.router = Router(dim, experts.num_experts, router, recipe)
        self.experts = Experts(dispatcher.num_local_experts, dim, experts.hidden, recipe)
        self.shared = Mlp(dim, experts.num_shared * experts.hidden, recipe) if experts.num_shared else None

    def route(self, x_TD: Tensor | Recallable, num_sequences: int) -> Routed:
        """Choose experts, announce how many rows go where, and cast once for dispatch and the shared experts alike."""
        x_TD = kept(x_TD)
        routing = self.router(x_TD, num_sequences)
        announced = self.dispatcher.announce(routing.topk_ids_TK)
        x = activation(x_TD, self.recipe, power_of_two=True)
        return Routed(x, announced, routing.topk_weights_TK, routing.balance_loss)

    def compute(self, received: Received, x: Activation) -> tuple[Tensor, Tensor | None]:
        """The compute between the two messages: y [R, D] of the routed experts, [T, D] of the shared ones."""
        shared_TD = None if self.shared is None else self.shared(x)
        return self.experts(received), shared_TD

    def forward(self, routed: Routed) -> Tensor:
        """Dispatch, experts and combine under ordinary autograd, each message waited for at once."""
        received = dispatched(self.dispatcher, routed.x, routed.announced, routed.topk_weights_TK)
        y_RD, shared_TD = self.compute(received, routed.x)
        return with_shared(combined(self.dispatcher, y_RD, received), shared_TD)


def with_shared(routed_TD: Tensor, shared_TD: Tensor | None) -> Tensor:
    """The sum of what routed and shared experts give."""
    return routed_TD if shared_TD is None else shared_TD + routed_TD
