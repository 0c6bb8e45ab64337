"""A mixture of experts: route, announce, cast; dispatch; experts; combine; the shared experts beside them.

Parallelism is the dispatcher's business alone. `MoE.route`, `shared` and `experts` are the stretches of compute around
the messages; a block's phases (`model.phases`) call them with messages in between that a schedule may hide, `forward`
calls them under ordinary autograd and waits for each message.

The routed experts of a rank are two stacked Linears on rows grouped by expert, one launch a product: rows of expert e
lie in [offsets[e], offsets[e + 1]). Groups are 128-aligned: a tile of columns never holds tokens of two experts. An
expert without tokens costs nothing and its `main_grad` is not touched.

Legend: T tokens, D model, F expert hidden, K top-k, e local experts, R received rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.grouped_gemm import grouped_gemm, grouped_wgrad
from fp8moe.kernels.grouped_mm import grouped_mm, grouped_mm_wgrad
from fp8moe.layers.attention.context import ContextExchange
from fp8moe.layers.balance import BalanceShare
from fp8moe.layers.dispatch import Announced, Dispatcher, Received, combined, dispatched
from fp8moe.layers.linear import QuantizedWeight, entry
from fp8moe.layers.mlp import ExpertBiases, Mlp, gated_mlp
from fp8moe.layers.operand import Activation, Rows, activation
from fp8moe.layers.recipe import Recipe
from fp8moe.layers.recompute import Recallable, kept
from fp8moe.layers.router import Router, RouterConfig
from fp8moe.limits import SIZE, Range, check_fields


@dataclass(frozen=True)
class ExpertsConfig:
    """Routed and shared experts."""

    num_experts: int  # routed experts of a layer
    hidden: int  # features inside an expert
    num_shared: int = 1  # experts that every token sees
    # silu(gate) * up (swiglu), or GPT-OSS's gate * sigmoid(1.702 gate) * (up + 1), both clamped
    # (swiglu_clamped)
    activation: Literal["swiglu", "swiglu_clamped"] = "swiglu"
    swiglu_limit: float = 7.0  # of swiglu_clamped: the most of gate, and of up's absolute value
    bias: bool = False  # the routed experts' products have biases

    def __post_init__(self) -> None:
        check_fields(
            self,
            "model.experts",
            num_experts=Range(least=1, most=2**16),
            hidden=SIZE,
            num_shared=Range(least=0, most=1024, use="use 0 for none"),
            swiglu_limit=Range(above=0, most=1e6, use="GPT-OSS has 7.0"),
        )

    @property
    def limit(self) -> float | None:
        """Where the activation is clamped; None for plain SwiGLU."""
        return self.swiglu_limit if self.activation == "swiglu_clamped" else None

    def num_parameters(self, dim: int, routed: int) -> int:
        """Parameters of `routed` routed experts and of all shared ones, in a model of `dim` features."""
        biases = self.bias * (2 * self.hidden + dim) * routed
        return 3 * dim * self.hidden * (routed + self.num_shared) + biases


@dataclass(frozen=True)
class Routed:
    """Tokens ready to be dispatched: cast activations, the announcement of their experts, and their routing weights.

    The balance loss and, where ranks share sequences, the value of this rank's share are those of `Routing`.
    """

    x: Activation
    announced: Announced
    topk_weights_TK: Tensor
    balance_loss: Tensor
    balance_share: BalanceShare | None = None


class MoE(nn.Module):
    """x [T, D] -> [T, D]: the sum of the routed experts that the router chooses and of the shared experts."""

    def __init__(
        self, dim: int, router: RouterConfig, experts: ExpertsConfig, recipe: Recipe, dispatcher: Dispatcher
    ) -> None:
        super().__init__()
        self.recipe, self.dispatcher = recipe, dispatcher
        self.router = Router(dim, experts.num_experts, router, recipe)
        self.experts = Experts(dispatcher.num_local_experts, dim, experts, recipe)
        shared = experts.num_shared * experts.hidden
        self.shared = Mlp(dim, shared, recipe, limit=experts.limit) if shared else None

    def route(
        self,
        x_TD: Tensor | Recallable,
        num_sequences: int,
        exchange: ContextExchange | None = None,
        given_TK: Tensor | None = None,
    ) -> Routed:
        """Choose experts, announce how many rows go where; one cast serves dispatch and the shared experts alike.

        A norm has made it already, with the tensor that the router reads (`Feeds.MOE`). given: experts in place of the
        router's choice, as `Router.forward` takes them.
        """
        x_TD = kept(x_TD)
        routing = self.router(x_TD, num_sequences, exchange, given_TK)
        announced = self.dispatcher.announce(routing.topk_ids_TK)
        x = activation(x_TD, self.recipe, power_of_two=True)
        return Routed(x, announced, routing.topk_weights_TK, routing.balance_loss, routing.balance_share)

    def forward(self, routed: Routed) -> Tensor:
        """Dispatch, experts and combine under ordinary autograd, each message waited for at once."""
        received = dispatched(self.dispatcher, routed.x, routed.announced, routed.topk_weights_TK)
        shared_TD = None if self.shared is None else self.shared(routed.x)
        return with_shared(combined(self.dispatcher, self.experts(received), received), shared_TD)


def with_shared(routed_TD: Tensor, shared_TD: Tensor | None) -> Tensor:
    """The sum of what routed and shared experts give."""
    return routed_TD if shared_TD is None else shared_TD + routed_TD


class Experts(nn.Module):
    """`gate_up.weight` [e, 2F, D] and `down.weight` [e, D, F] of e local experts, stacked.

    With biases also `gate_up_bias` [e, 2F] and `down_bias` [e, D]; the routing weight multiplies that of down as well.
    """

    def __init__(self, num_local_experts: int, dim: int, config: ExpertsConfig, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.limit, hidden = recipe, config.limit, config.hidden
        self.gate_up = GroupedLinear(num_local_experts, dim, 2 * hidden, recipe, matrix_rows=(hidden, hidden))
        self.down = GroupedLinear(num_local_experts, hidden, dim, recipe)
        self.gate_up_bias = _make_bias(num_local_experts, 2 * hidden, recipe) if config.bias else None
        self.down_bias = _make_bias(num_local_experts, dim, recipe) if config.bias else None

    def forward(self, received: Received) -> Tensor:
        """-> y [R, D], each row already multiplied by its routing weight; the gradient may return in FP8."""
        biases = None
        if self.gate_up_bias is not None and self.down_bias is not None:
            biases = ExpertBiases(self.gate_up_bias, self.down_bias, received.group_offsets)
        return gated_mlp(
            received.x,
            self.gate_up.at(received.group_offsets),
            self.down.at(received.group_offsets),
            self.recipe,
            entry(received.x.autograd_handle, self.down),
            weights_R=received.weights_R,
            gradient=received.gradient,
            limit=self.limit,
            biases=biases,
        )


def _make_bias(num_local_experts: int, features: int, recipe: Recipe) -> nn.Parameter:
    """An uninitialised bias [e, features]; `init_weights` fills it with zeros."""
    bias = nn.Parameter(torch.empty(num_local_experts, features, dtype=recipe.dtype))
    bias.is_expert, bias.initial_value = True, 0.0  # type: ignore[attr-defined]
    return bias


class GroupedLinear(QuantizedWeight):
    """`weight` [e, out_features, in_features] of the e experts this rank holds."""

    def __init__(
        self,
        num_local_experts: int,
        in_features: int,
        out_features: int,
        recipe: Recipe,
        *,
        matrix_rows: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__((num_local_experts, out_features, in_features), recipe, matrix_rows)
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
