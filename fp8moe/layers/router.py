"""Router: which experts a token goes to, with what weight, and how their load is balanced (DeepSeek-V3 report, 2.1.2).

The gate's product and one op, `kernels.route`, which makes scores, choice, weights, loads and the balance loss of its
logits; on a GPU that is four launches, six in backward and two in the weight gradient, however many the tokens, and
none of them waits.

The product is FP32 of operands in the recipe's dtype. On a GPU tensor cores multiply BF16 and sum in FP32; the FP32
gradient of the logits is then split into a BF16 number and a BF16 remainder, which together have 16 bits of it, and
multiplied as two. Elsewhere operands are widened. Both products of the backward read x and the weight as they are kept:
FP32 copies of x, which is kept or recomputed anyway, would weigh more than x. The weight gradient is put off like a
Linear's and goes into FP32 `main_grad` without passing through BF16. FP32 products on a GPU were refused: an FP32 copy
of x, and a tenth of the speed.

Load is balanced by the bias, moved after each step: an expert above the mean load loses gamma of it, one below gains
it. Loads are counted in training forwards only, once, and summed over all ranks. A faint sequence-wise loss keeps a
single sequence from collapsing on few experts.

Where ranks share sequences (`attention.context`) the loss is still that of whole sequences: loads are summed over the
ranks by a message that nobody waits for before the loss is read, and each rank has the share of it that its own tokens'
scores make.

Experts may be given, the choice of another forward (`given_experts`): what that chose is used, at this router's scores.

Legend: T tokens, D model, E experts, K top-k, B sequences, S tokens of a sequence, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fp8moe.kernels.gemm import wgrad
from fp8moe.kernels.route import route, route_backward
from fp8moe.layers.attention.context import ContextExchange
from fp8moe.layers.balance import BalanceShare, mean_shares
from fp8moe.layers.bias import add_total, make_bias
from fp8moe.layers.given_experts import route_as_given
from fp8moe.layers.linear import entry, main_grad_of
from fp8moe.layers.phase import submit
from fp8moe.layers.recipe import Recipe
from fp8moe.layers.recompute import Recallable, kept
from fp8moe.limits import POSITIVE, Range, check_fields

Score = Literal["sigmoid", "softmax", "softmax_topk"]
GroupScore = Literal["top2_sum", "max"]


@dataclass(frozen=True)
class RouterConfig:
    """How experts are chosen for a token."""

    topk: int  # experts of a token
    num_groups: int = 1  # groups that the experts are divided into; 1: no groups
    top_groups: int = 1  # best groups, of which a token's experts come
    # sigmoid or softmax of the gate's logits; softmax_topk: chosen by the logits, weighted by their softmax
    # over the chosen
    score: Score = "sigmoid"
    # a group counts by the sum of its two best scores (top2_sum) or by its best (max)
    group_score: GroupScore = "top2_sum"
    normalize_topk: bool = True  # weights of the chosen sum to 1, as those of softmax_topk always do
    route_scale: float = 1.0  # factor of the weights, after that
    force_balance: bool = False  # experts in turn, the same number for all: for benchmarks
    aux_loss_alpha: float = 1e-4  # weight of the sequence-wise balance loss
    bias_gamma: float = 1e-3  # step of the balancing bias, which moves the choice alone; 0: it stays
    gate_bias: bool = False  # a learned bias of the gate's logits, beside that of balancing

    def __post_init__(self) -> None:
        check_fields(
            self,
            "model.router",
            topk=POSITIVE,
            num_groups=POSITIVE,
            top_groups=POSITIVE,
            route_scale=Range(above=0, most=1000),
            aux_loss_alpha=Range(least=0, most=100, use="use 0 for none"),
            bias_gamma=Range(least=0, most=1, use="use 0 for none"),
        )
        if self.score == "softmax_topk" and not self.normalize_topk:
            raise ValueError(
                "model.router.normalize_topk=false contradicts score=softmax_topk, whose weights sum to 1: "
                "use true, or score=softmax"
            )
        if self.top_groups > self.num_groups:
            raise ValueError(
                f"model.router.top_groups={self.top_groups} exceeds num_groups={self.num_groups}: "
                f"use at most {self.num_groups}"
            )

    def check(self, num_experts: int) -> None:
        """Raise ValueError unless `num_experts` experts can be routed to so."""
        if num_experts % self.num_groups:
            legal = max(g for g in range(1, self.num_groups + 1) if num_experts % g == 0)
            raise ValueError(
                f"model.router.num_groups={self.num_groups} does not divide num_experts={num_experts}: use {legal}"
            )
        reachable = num_experts // self.num_groups * self.top_groups
        if self.topk > reachable:
            raise ValueError(
                f"model.router.topk={self.topk} exceeds the {reachable} experts of "
                f"top_groups={self.top_groups} groups: use at most {reachable}"
            )


@dataclass(frozen=True)
class Routing:
    """Choice and weights of each token; `balance_loss` is the sequence-wise loss summed over sequences, unweighted.

    own_ids_TK: where experts were given, those that the router would have chosen. balance_share: where ranks share
    sequences, the value of this rank's share; the loss is then zero with its gradient.
    """

    topk_ids_TK: Tensor
    topk_weights_TK: Tensor
    balance_loss: Tensor
    own_ids_TK: Tensor | None = None
    balance_share: BalanceShare | None = None


class Router(nn.Module):
    """`weight` [E, D], `gate_bias` [E] where it has one; buffers `bias_E` (FP32) and `counts_E` (int64).

    The counts are loads since the last update of `bias_E`.
    """

    bias_E: Tensor
    counts_E: Tensor

    def __init__(self, dim: int, num_experts: int, config: RouterConfig, recipe: Recipe) -> None:
        super().__init__()
        self.config, self.num_experts = config, num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, dim, dtype=recipe.dtype))
        self.gate_bias = make_bias(num_experts, recipe) if config.gate_bias else None
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("counts_E", torch.zeros(num_experts, dtype=torch.int64))

    def forward(
        self,
        x_TD: Tensor | Recallable,
        num_sequences: int,
        exchange: ContextExchange | None = None,
        given_TK: Tensor | None = None,
    ) -> Routing:
        """x [T, D], T = num_sequences x S, sequence after sequence -> the routing of every token.

        exchange: to the ranks that hold the other parts of the sequences. given: integers [T, K], the experts of each
        token whatever the scores; -1: a token chooses its own.
        """
        x = kept(x_TD)
        counts_E = self.counts_E if self.training and torch.is_grad_enabled() else None
        shares: list[BalanceShare] = []
        ids_TK, weights_TK, balance_loss, *own = _RouterFunction.apply(
            x.tensor, entry(x.tensor, self), x.recall, self, num_sequences, counts_E, exchange, shares, given_TK
        )
        return Routing(ids_TK, weights_TK, balance_loss, *(own or [None]), *shares)


class _RouterFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, entry: Tensor | None, recall: Callable[[], Tensor], router: Router, num_sequences: int,
        counts_E: Tensor | None, exchange: ContextExchange | None, shares: list[BalanceShare], given_TK: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        c, weight_ED = router.config, router.weight.detach()
        logits_TE = gate_logits(x_TD, weight_ED)
        if router.gate_bias is not None:
            logits_TE += router.gate_bias.detach()
        ids_TK, weights_TK, loss, f_BE = route(
            logits_TE, router.bias_E, counts_E if given_TK is None else None, topk=c.topk, num_groups=c.num_groups,
            top_groups=c.top_groups, score=c.score, group_score=c.group_score, normalize=c.normalize_topk,
            route_scale=c.route_scale, num_sequences=num_sequences, force_balance=c.force_balance,
        )  # fmt: skip
        own = () if given_TK is None else (ids_TK,)
        if given_TK is not None:
            ids_TK, weights_TK, loss, f_BE = route_as_given(
                logits_TE, ids_TK, given_TK, counts_E, score=c.score, normalize=c.normalize_topk,
                route_scale=c.route_scale, num_sequences=num_sequences,
            )  # fmt: skip
        ctx.mark_non_differentiable(ids_TK, *own)
        ctx.f_BE = lambda: f_BE
        if exchange is not None:
            shares.append(BalanceShare(f_BE, mean_shares(logits_TE, c.score, num_sequences), exchange))
            ctx.f_BE, loss = shares[0].f_BE, loss.new_zeros(())
        ctx.set_materialize_grads(False)  # it would fill a gradient of the ids, too
        ctx.recall, ctx.router, ctx.of_route = recall, router, (logits_TE, ids_TK)
        return ids_TK, weights_TK, loss, *own

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        router, recall = ctx.router, ctx.recall
        c, weight_ED, gate_bias = router.config, router.weight.detach(), router.gate_bias
        (logits_TE, ids_TK), f_BE, (_, d_weights_TK, d_loss, *_) = ctx.of_route, ctx.f_BE(), grads
        d_weights_TK = f_BE.new_zeros(ids_TK.shape) if d_weights_TK is None else d_weights_TK
        d_loss = f_BE.new_zeros(()) if d_loss is None else d_loss
        d_logits_TE = route_backward(
            logits_TE, ids_TK, f_BE, d_weights_TK, d_loss, score=c.score, normalize=c.normalize_topk,
            route_scale=c.route_scale,
        )  # fmt: skip
        if gate_bias is not None:
            total_E = d_logits_TE.sum(0)
            submit(lambda: add_total(main_grad_of(gate_bias), total_E))
        by_parts = on_tensor_cores(weight_ED)
        d_logits = split_bf16(d_logits_TE) if by_parts else d_logits_TE.unsqueeze(0)
        submit(lambda: gate_wgrad(d_logits, recall(), main_grad_of(router.weight)))
        return gate_dgrad(d_logits, weight_ED) if ctx.needs_input_grad[0] else None, *(None,) * 8


def on_tensor_cores(operand: Tensor) -> bool:
    """Whether the gate's products are of BF16 operands on a device that sums those in FP32."""
    return operand.is_cuda and operand.dtype is torch.bfloat16


def gate_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x [T, D] @ weight^T -> FP32 [T, E], not rounded to the dtype of its operands."""
    if on_tensor_cores(weight_ED):
        return torch.mm(x_TD, weight_ED.t(), out_dtype=torch.float32)
    return nn.functional.linear(x_TD.float(), weight_ED.float())


def split_bf16(x_TE: Tensor) -> Tensor:
    """FP32 [T, E] -> BF16 [2, T, E]: x rounded, and what that lost, rounded; their sum is x to 2^-17 of it."""
    parts = torch.empty(x_TE.shape[0], 2, x_TE.shape[1], dtype=torch.bfloat16, device=x_TE.device).transpose(0, 1)
    high, low = parts.unbind()
    high.copy_(x_TE)
    torch.sub(x_TE, high, out=low)
    return parts


def gate_dgrad(d_logits_PTE: Tensor, weight_ED: Tensor) -> Tensor:
    """P parts whose sum is the gradient of the logits -> that of x [T, D] in the weight's dtype, rounded once."""
    if len(d_logits_PTE) == 1:
        return (d_logits_PTE[0] @ weight_ED.float()).to(weight_ED.dtype)
    return d_logits_PTE.transpose(0, 1).flatten(1) @ weight_ED.repeat(len(d_logits_PTE), 1)


def gate_wgrad(d_logits_PTE: Tensor, x_TD: Tensor, main_grad_ED: Tensor) -> None:
    """main_grad [E, D] (FP32) += the sum of the parts, transposed, @ x [T, D]."""
    for part_TE in d_logits_PTE:
        wgrad(part_TE, x_TD, main_grad_ED)


@torch.no_grad()
def update_bias(model: nn.Module, gamma: float) -> None:
    """Move every router's bias by gamma towards balance and forget the counts. Counts must be reduced over ranks."""
    for module in model.modules():
        counts, bias = getattr(module, "counts_E", None), getattr(module, "bias_E", None)
        if counts is not None and bias is not None:
            load = counts.float()
            bias += gamma * torch.sign(load.mean() - load)
            counts.zero_()


def violations(loads_LE: Tensor) -> Tensor:
    """MaxVio of each row of loads [..., E]: by how much its busiest expert exceeds the mean load, relative to it, FP32.

    0 when balanced or without load.
    """
    load = loads_LE.float()
    mean = load.mean(-1)
    return torch.where(mean > 0, load.amax(-1) / mean - 1, 0.0)


def max_violation(counts_E: Tensor) -> float:
    """MaxVio of one layer's loads [E], on the host."""
    return float(violations(counts_E))
